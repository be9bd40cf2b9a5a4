import logging
import re

import pytest

from ichseg.errors import TrainingError
from training.jobs.job_log import logged_to


def test_the_log_file_has_the_time_of_each_line_and_how_it_ended(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "run" / "train.log"
    with logged_to(path):
        logging.getLogger("training").info("one")
    logging.getLogger("training").info("of nobody")
    with pytest.raises(TrainingError), logged_to(path):
        raise TrainingError("the loss is nan")
    with pytest.raises(ZeroDivisionError), logged_to(path):
        raise ZeroDivisionError
    lines = path.read_text().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d one$", lines[0])
    assert lines[1].endswith(" error: the loss is nan")
    assert lines[2].endswith(" ended by ZeroDivisionError")
    assert lines[3] == "Traceback (most recent call last):"
    assert "of nobody" not in path.read_text()
