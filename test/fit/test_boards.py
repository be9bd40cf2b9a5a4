"""TensorBoard and MLflow: what they are told, and what they read themselves."""

import dataclasses
import importlib.machinery
import sys
import types

import pytest
from helpers.epochs import CONFIG, ROWS, watch

from ichseg.errors import TrainingError
from training.fit import progress


@pytest.mark.parametrize("board", ["tensorboard", "mlflow"])
def test_a_board_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, board):
    monkeypatch.setitem(sys.modules, board, None)
    config = dataclasses.replace(CONFIG, **{board: True})
    with pytest.raises(TrainingError, match=f"not installed; `pip install {board}`"):
        watch(tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_epoch(tmp_path, monkeypatch):
    written, closed = [], []
    board = types.SimpleNamespace(
        add_scalar=lambda name, value, epoch: written.append((name, value, epoch)),
        flush=lambda: None,
        close=lambda: closed.append(True),
    )
    monkeypatch.setattr(progress, "open_tensorboard", lambda folder: board)
    monkeypatch.setattr(progress, "require_boards", lambda config: None)
    config = dataclasses.replace(CONFIG, tensorboard=True)
    with watch(tmp_path, config, history=ROWS[:1]) as seen:
        seen.epoch(ROWS, 24.5, last=True)
    assert written == [
        ("loss/training", 0.5, 1),
        ("loss/validation", 0.25, 1),
        ("learning rate", 3e-4, 1),
        ("seconds/compute", 12.0, 1),
        ("seconds/data wait", 0.5, 1),
        ("loss/training", 0.25, 2),
        ("loss/validation", 0.125, 2),
        ("dice/mean", 0.75, 2),
        ("learning rate", 3e-4, 2),
        ("seconds/compute", 12.0, 2),
        ("seconds/data wait", 0.0, 2),
        ("dice/edema", 0.5, 2),
        ("dice/tumour", 1.0, 2),
    ]
    assert closed == [True]


def test_tensorboard_reads_what_a_resumed_run_wrote(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, tensorboard=True)
    with watch(tmp_path, config) as seen:
        seen.epoch(ROWS[:1], 12.5, last=False)
        lost = dataclasses.replace(ROWS[1], train_loss=9.0)  # killed before its checkpoint
        seen.epoch([ROWS[0], lost], 24.5, last=False)
    with watch(tmp_path, config, history=ROWS[:1]) as seen:
        seen.epoch(ROWS, 24.5, last=True)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = [(event.step, event.value) for event in found.Scalars("loss/training")]
    assert read == [(1, 0.5), (2, 0.25)]


class _PretendedMlflow(types.ModuleType):
    """MLflow as far as a training uses it, keeping what it is told."""

    class MlflowException(Exception):  # noqa: N818
        """What MLflow raises."""

    def __init__(self, exists=False):
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.told, self.gone, self._exists = [], False, exists

    def is_tracking_uri_set(self):
        return False

    def MlflowClient(self, uri):  # noqa: N802
        self.told.append(("client", uri))
        return self

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="7") if self._exists else None

    def create_experiment(self, name, artifact_location):
        self.told.append(("files", artifact_location))
        return name

    def create_run(self, experiment, run_name):
        self.told.append(("run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

    def log_param(self, run, name, value):
        self.told.append((name, value))

    def log_metric(self, run, name, value, step):
        if self.gone:
            raise self.MlflowException("the server\nhas gone")
        self.told.append((name, value, step))

    def set_terminated(self, run):
        if self.gone:
            raise self.MlflowException("the server\nhas gone")
        self.told.append(("end", run))


@pytest.fixture
def mlflow(monkeypatch):
    pretended = _PretendedMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", pretended)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", pretended)
    database = types.ModuleType("sqlalchemy")
    database.__spec__ = importlib.machinery.ModuleSpec("sqlalchemy", None)
    monkeypatch.setitem(sys.modules, "sqlalchemy", database)
    return pretended


def test_mlflow_gets_the_settings_and_every_epoch(tmp_path, mlflow):
    config = dataclasses.replace(CONFIG, mlflow=True)
    with watch(tmp_path, config, history=ROWS[:1]) as seen:
        seen.epoch(ROWS, 24.5, last=True)
    told = mlflow.told
    assert told[0] == ("client", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    assert (tmp_path / "mlflow").is_dir()
    assert told[1] == ("files", (tmp_path / "mlflow").as_uri())
    assert told[2][:2] == ("run", "ichseg")
    assert ("learning_rate", CONFIG.learning_rate) in told
    assert ("loss/training", 0.5, 1) in told
    assert ("dice/tumour", 1.0, 2) in told
    assert told[-1] == ("end", "r")


def test_an_mlflow_without_its_database_is_told(tmp_path, mlflow, monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(TrainingError, match="no database; `pip install mlflow` in place of"):
        watch(tmp_path, dataclasses.replace(CONFIG, mlflow=True))
    monkeypatch.setattr(mlflow, "is_tracking_uri_set", lambda: True)  # a server has one
    with watch(tmp_path, dataclasses.replace(CONFIG, mlflow=True)):
        assert mlflow.told[:2] == [("client", None), ("files", None)]


def test_mlflow_itself_reads_what_was_logged(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")  # which mlflow-skinny lacks
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(CONFIG, mlflow=True)
    with watch(tmp_path, config) as seen:
        seen.epoch(ROWS[:1], 12.5, last=False)
        seen.epoch(ROWS, 24.5, last=True)
    with watch(tmp_path, config, history=ROWS[:1]) as seen:  # a run of its own, from its beginning
        seen.epoch(ROWS, 24.5, last=True)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    found = client.get_experiment_by_name("ichseg")
    runs = client.search_runs([found.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    for run in runs:
        assert float(run.data.params["learning_rate"]) == CONFIG.learning_rate
        losses = client.get_metric_history(run.info.run_id, "loss/training")
        assert [(each.step, each.value) for each in losses] == [(1, 0.5), (2, 0.25)]
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow", "progress.csv", "progress.png"}


def test_an_mlflow_that_has_gone_does_not_end_the_training(tmp_path, mlflow, caplog):
    with watch(tmp_path, dataclasses.replace(CONFIG, mlflow=True)) as seen:
        mlflow.gone = True
        seen.epoch(ROWS, 24.5, last=True)
    assert caplog.text.count("MLflow gets no more of this training (the server)") == 1
    assert ("end", "r") not in mlflow.told


def test_an_mlflow_that_goes_before_its_run_is_ended_does_not_end_the_training(
    tmp_path, mlflow, caplog
):
    with watch(tmp_path, dataclasses.replace(CONFIG, mlflow=True)) as seen:
        seen.epoch(ROWS, 24.5, last=True)
        mlflow.gone = True
    assert "MlflowBoard is not brought up to date (the server has gone)" in caplog.text


def test_a_tensorboard_that_cannot_be_written_does_not_end_the_training(
    tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    board = types.SimpleNamespace(add_scalar=full, flush=full, close=full)
    monkeypatch.setattr(progress, "open_tensorboard", lambda folder: board)
    monkeypatch.setattr(progress, "require_boards", lambda config: None)
    config = dataclasses.replace(CONFIG, tensorboard=True)
    with watch(tmp_path, config, history=ROWS[:1]) as seen:
        seen.epoch(ROWS, 24.5, last=True)
    assert caplog.text.count("No space left on device") == 1
