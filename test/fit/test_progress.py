import dataclasses
import io
import logging
import math
import re
import sys

import numpy as np
import pytest
import torch
from helpers.epochs import CONFIG, CPU, ROWS, watch

from training.fit import history, progress
from training.fit.history import EpochRow
from training.fit.progress import Moment


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal with the log going there."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)
    assert handler.stream is stream


def moment(**changes):
    return dataclasses.replace(
        Moment(
            epoch=3,
            step=4,
            steps=8,
            loss=-0.5,
            lr=3e-4,
            seconds=4.0,
            data_wait_s=1.0,
            elapsed_s=28.5,
        ),
        **changes,
    )


def plain(text):
    """What is left of a terminal's output without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_table_by_hand(tmp_path):
    history.write_csv(ROWS, tmp_path / "progress.csv", ("edema", "tumour"))
    assert (tmp_path / "progress.csv").read_text() == (
        "epoch,train_loss,validation_loss,pseudo_dice,lr,seconds,compute_s,data_wait_s,"
        "dice_edema,dice_tumour\n"
        "1,0.5,0.25,,0.0003,12.5,12,0.5,,\n"
        "2,0.25,0.125,0.75,0.0003,12,12,0,0.5,1\n"
    )
    history.write_csv(ROWS[1:], tmp_path / "progress.csv", ("bleed",))
    assert (tmp_path / "progress.csv").read_text() == (
        "epoch,train_loss,validation_loss,pseudo_dice,lr,seconds,compute_s,data_wait_s\n"
        "2,0.25,0.125,0.75,0.0003,12,12,0\n"
    )


def test_rows_of_an_older_checkpoint_have_no_dice_a_class(tmp_path):
    row = EpochRow(1, 0.5, 0.25, 0.5, 3e-4, 12.5, 0.5)
    history.write_csv([row], tmp_path / "progress.csv", ("edema", "tumour"))
    assert (tmp_path / "progress.csv").read_text().endswith("0.5,0.0003,12.5,12,0.5,,\n")


def test_the_line_of_an_epoch():
    assert history.describe(ROWS[1], 1000, 3725.2) == (
        "epoch 2/1000  train +0.2500  validation +0.1250  dice 0.750 (0.500, 1.000)  lr 3.00e-04  "
        "12.0 s (data wait 0.0 s)  ETA 1:02:06"
    )
    one = dataclasses.replace(ROWS[0], class_dice=(None,))
    assert "  dice   -    lr" in history.describe(one, 1000, 0)
    many = dataclasses.replace(ROWS[1], class_dice=(0.75,) * 5)
    assert "  dice 0.750  lr" in history.describe(many, 1000, 0)


def test_time_left_by_hand():
    rows = [dataclasses.replace(ROWS[0], seconds=float(s)) for s in (1000, *range(1, 11))]
    # the last ten took 5.5 s on average, and 20 - 11 are to come
    assert history.left_s(rows, epochs=20) == pytest.approx(9 * 5.5)
    assert history.left_s(rows, epochs=20, budget_s=30.0) == 30.0
    assert history.left_s(rows, epochs=20, budget_s=-1.0) == 0
    assert history.left_s(rows, epochs=5) == 0  # the length was lowered
    assert history.left_s([], epochs=5, epoch_s=2.0) == 10
    assert history.left_s([], epochs=5, epoch_s=2.0, spent_s=1.5, budget_s=9.0) == 8.5


def test_share_of_waiting_by_hand():
    row = dataclasses.replace(ROWS[0], seconds=10.0, data_wait_s=4.0)
    assert history.waiting(row) == pytest.approx(0.4)
    assert history.waiting(row, startup_s=3.0) == pytest.approx(1 / 7)
    assert history.waiting(row, startup_s=5.0) == 0
    assert history.waiting(dataclasses.replace(row, seconds=0, data_wait_s=0)) == 0


def test_waiting_is_warned_of_once_and_when_it_grows(tmp_path, caplog):
    warned = []
    with watch(tmp_path, dataclasses.replace(CONFIG, epochs=100)) as seen:
        for epoch, share in enumerate([0.5, 0.05, 0.11, 0.12, 0.2, 0.22, 0.3, 0.5], start=1):
            caplog.clear()
            # the first batch takes the workers' start, most of the first epoch's wait
            seen.step(moment(epoch=epoch, step=1, data_wait_s=4.5 if epoch == 1 else 0.0))
            seen.epoch([EpochRow(epoch, 0, 0, None, 1e-3, 10.0, 10 * share)], 0.0, last=False)
            if "went into waiting" in caplog.text:
                warned.append(epoch)
    assert warned == [3, 6, 8]  # at 0.11, at 0.22, at 0.5
    assert caplog.messages[-1] == (
        "warning: 50 % of epoch 8 went into waiting for batches; try --workers above 1 or "
        "--prefetch above 4"
    )


def test_advice_fits_the_engine():
    gpu = torch.device("cuda")
    host = dataclasses.replace(CONFIG, augmentation_engine="host", workers=3)
    assert progress.advise(host, gpu) == (
        "try --augmentation-engine device, or --workers above 3 or --prefetch above 4"
    )
    assert progress.advise(dataclasses.replace(host, workers=0), CPU) == "try --workers above 0"
    device = dataclasses.replace(CONFIG, augmentation_engine="device", workers=3)
    assert progress.advise(device, gpu) == "try --gpu-cache yes, or --workers above 3"


@pytest.mark.parametrize("colour", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_elsewhere_than_at_a_terminal_there_are_plain_lines(tmp_path, capfd, monkeypatch, colour):
    monkeypatch.setenv(colour, "1")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with caplog_at_info(), watch(tmp_path) as seen:
            seen.step(moment())
            seen.epoch(ROWS, 24.5, last=True)
    finally:
        logging.getLogger().removeHandler(handler)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == history.describe(ROWS[1], 4, 2 * 12.25) + "\n"


def caplog_at_info():
    """The root logger at INFO, as the command line sets it."""

    class Level:
        def __enter__(self):
            self.before = logging.getLogger().level
            logging.getLogger().setLevel(logging.INFO)

        def __exit__(self, *_):
            logging.getLogger().setLevel(self.before)

    return Level()


def test_at_a_terminal_two_lines_follow_the_steps(tmp_path, terminal):
    stderr = sys.stderr
    with watch(tmp_path, history=ROWS, stream=terminal) as seen:
        seen.step(moment())
        first = plain(terminal.getvalue())
        assert "tiny, fold 0  epoch 3/4" in first
        assert "step 4/8" in first
        # two epochs of 12.25 s are left, 4 s of which have passed
        assert "loss -0.5000  dice 0.750  lr 3.00e-04  data wait 25 %  ETA 0:00:21" in first
        seen.step(moment(step=5))  # too soon after the other
        assert plain(terminal.getvalue()) == first
        seen.step(moment(step=2, steps=2, validating=True))  # the last one is shown
        assert "validating 2/2" in plain(terminal.getvalue())
        logging.getLogger("training").info("a line, not [bold]wrapped[/bold]" + 100 * " end")
        assert "\na line, not [bold]wrapped[/bold]" + 100 * " end" + "\n" in plain(
            terminal.getvalue()
        ).replace("\r", "\n")
    assert sys.stderr is stderr
    # taken away: both lines cleared
    assert terminal.getvalue().endswith("\r\x1b[1A\x1b[2K\x1b[1A\x1b[2K")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with watch(tmp_path, stream=terminal) as seen:
        seen.step(moment())
    assert terminal.getvalue() == ""


def test_time_left_in_the_first_epoch_goes_by_its_steps(tmp_path, terminal):
    with watch(tmp_path, stream=terminal) as seen:
        # a second a step, so 10 s an epoch of 8 + 2; four epochs less 4 s
        seen.step(moment(epoch=1))
        assert "dice   -    lr 3.00e-04  data wait 25 %  ETA 0:00:36" in plain(terminal.getvalue())
    limited = dataclasses.replace(CONFIG, minutes=0.5)
    with watch(tmp_path, limited, stream=terminal) as seen:
        # 30 s in all, 20 of which had passed when this epoch began
        seen.step(moment(epoch=1, elapsed_s=24.0))
        assert "ETA 0:00:06" in plain(terminal.getvalue())


def test_moving_average_by_hand():
    nan, inf = math.nan, math.inf
    assert history.moving_average([1, 2, 6, 3, 8], 1) == [1, 3, 11 / 3, 17 / 3, 8]
    assert history.moving_average([1, 2, 6, 3, 8], 9) == [1, 3, 4, 17 / 3, 8]
    found = history.moving_average([nan, 2, inf, nan, nan, nan], 1)
    np.testing.assert_equal(found, [nan, 2, 2, nan, nan, nan])


@pytest.mark.parametrize("count", [1, 5, 120])
def test_the_picture_shows_what_was_measured(tmp_path, count):
    rows = [
        EpochRow(e, 1 / e, 2 / e, None if e % 3 == 2 else 1 - 1 / e, 3e-4 / e, 10.0, 0.1 * e)
        for e in range(1, count + 1)
    ]
    figure = history.plot(rows, "tiny, fold 0")
    losses, rates, times, scores = figure.axes
    drawn = {line.get_label(): line for line in losses.get_lines() + scores.get_lines()}
    for label, color, expected in (
        ("training loss", "tab:blue", [row.train_loss for row in rows]),
        ("validation loss", "tab:red", [row.validation_loss for row in rows]),
        (
            "Dice of validation patches",
            "tab:green",
            [math.nan if row.pseudo_dice is None else row.pseudo_dice for row in rows],
        ),
    ):
        line = drawn[label]
        assert line.get_color() == color
        np.testing.assert_array_equal(line.get_xdata(), range(1, count + 1))
        np.testing.assert_array_equal(line.get_ydata(), expected)
    assert drawn["Dice of validation patches"].axes is scores
    assert scores.get_ylim() == (0, 1)
    assert losses.get_title() == "tiny, fold 0"
    assert len(losses.get_lines()) == (4 if count == 120 else 2)  # with averages
    np.testing.assert_array_equal(rates.get_lines()[0].get_ydata(), [row.lr for row in rows])
    compute, wait = (patch.get_data() for patch in times.patches)
    np.testing.assert_allclose(compute.values, [10 - 0.1 * row.epoch for row in rows])
    np.testing.assert_allclose(wait.values, [10.0] * count)
    np.testing.assert_array_equal(wait.baseline, compute.values)
    history.write_picture(rows, tmp_path / "progress.png", title="tiny")
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_without_neighbours_is_marked():
    dice = [None] * 120
    dice[0] = dice[50] = dice[80] = dice[81] = 0.5
    rows = [EpochRow(e + 1, 0, 0, score, 1e-3, 1.0, 0.0) for e, score in enumerate(dice)]
    line = history.plot(rows, "").axes[3].get_lines()[0]
    known = {i for i in line.get_markevery() if dice[i] is not None}
    assert known == {0, 50}


def test_a_picture_of_losses_that_are_not_finite(tmp_path):
    rows = [EpochRow(1, math.nan, math.inf, None, 0.0, 0.0, 0.0)]
    history.write_picture(rows, tmp_path / "progress.png", title="tiny")
    assert (tmp_path / "progress.png").stat().st_size > 0


def test_one_slow_epoch_does_not_hide_the_others():
    seconds = [10.0, 11.0, 500.0, 10.0, 12.0]
    rows = [EpochRow(e, 0, 0, None, 1e-3, s, 0.0) for e, s in enumerate(seconds, start=1)]
    assert history.plot(rows, "").axes[2].get_ylim()[1] == pytest.approx(1.35 * 33)


def test_what_cannot_be_drawn_or_written_is_a_warning_and_training_goes_on(
    tmp_path, monkeypatch, caplog
):
    def failing(*_, **__):
        raise ValueError("no font\nat all")

    monkeypatch.setattr(progress, "write_picture", failing)
    (tmp_path / "progress.csv").mkdir()
    with watch(tmp_path) as told:
        for count in (1, 2):
            told.epoch(ROWS[:count], 10.0, last=True)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2  # once each
    assert warnings[0].startswith(f"warning: {tmp_path}/progress.csv is not brought up to date (")
    assert warnings[1] == (
        f"warning: {tmp_path}/progress.png is not brought up to date (no font at all); the "
        "training goes on"
    )
