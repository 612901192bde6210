"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard and, if asked, Weights & Biases."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from fooddiff.files.atomic import write_atomically
from fooddiff.files.hashes import sha256_of_json
from fooddiff.files.lock import locked


class Recorder:
    """Writes records of one run. Use as a context manager.

    A record belongs to a step. When a run resumes at step k, records of later steps are dropped from all files, so that
    no step appears twice.
    """

    def __init__(
        self, workdir: Path, *, resume_step: int | None, wandb_project: str | None = None, config: Mapping | None = None
    ):
        """Opens the files.

        Args:
            workdir: the run's directory.
            resume_step: steps that are done; records beyond it are dropped. None is for a process beside the training,
                which only appends.
            wandb_project: also log to this Weights & Biases project.
            config: what Weights & Biases shows as the run's config.

        Raises:
            ModuleNotFoundError: Weights & Biases is wanted and not installed.
        """
        self._path = Path(workdir) / "metrics.jsonl"
        if resume_step is not None:
            _drop_after(self._path, resume_step)
        else:
            _drop_cut_line(self._path)
        self._present = [record for record in read_scalars(workdir) if record["step"] == resume_step]
        with ExitStack() as files:
            self._jsonl = files.enter_context(self._path.open("a", encoding="utf-8"))
            # Not tensorboardX's SummaryWriter: a full disk ends its thread, and the next records wait for that forever.
            (Path(workdir) / "tb").mkdir(exist_ok=True)
            self._tensorboard = EventsWriter(str(Path(workdir) / "tb" / "events"), f".{time.time_ns()}")
            files.callback(self._tensorboard.close)
            if resume_step is not None:  # TensorBoard hides what it has from this step on
                self._event(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))
            self._wandb = _start_wandb(wandb_project, Path(workdir), config) if wandb_project else None
            self._files = files.pop_all()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._writing(), self._files:
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(kind is not None))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers, for instance {"train/loss": 0.1}. A number that is not finite is written as null.

        What a resumed run finds recorded at the step where it goes on is not recorded twice.

        Raises:
            OSError: a file could not be written.
        """
        record = {"step": step} | {name: value if np.isfinite(value) else None for name, value in values.items()}
        if record in self._present:
            return
        with self._writing():
            self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
            self._jsonl.flush()
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._event(Event(step=step, summary=summary))
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Records a PNG file that has already been written.

        Raises:
            OSError: a file could not be written.
        """
        with Image.open(path) as image:
            picture = Summary.Image(width=image.width, height=image.height, encoded_image_string=path.read_bytes())
        self._event(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=picture)])))
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._writing():
            self._tensorboard.write_event(event)
            self._tensorboard.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._path.parent}: a record could not be written ({error}). Checkpoints are as they were; once "
                f"there is room the same command goes on from the newest"
            ) from error


class NoRecorder:
    """Takes what a `Recorder` takes and writes nothing: for every process but the first."""

    def __enter__(self) -> "NoRecorder":
        return self

    def __exit__(self, *_) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Discards numbers."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Discards a picture."""


def read_scalars(workdir: Path) -> list[dict]:
    """Reads metrics.jsonl; a last line that a crash cut short is left out.

    Returns:
        One dict per record, {"step": int, name: float or None, ...}, in the order written.

    Raises:
        ValueError: a line is not such a record.
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [  # what follows the last newline is empty or was cut short
        _parse(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)
    ]


def _parse(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line)
        if type(record["step"]) is int and all(
            value is None or type(value) in (int, float) for value in record.values()
        ):
            return record
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(
        f"{where} is damaged: expected one JSON object with a step and numbers; delete that line"
    ) from None


def _drop_cut_line(path: Path) -> None:
    """Drops what a crash cut short, which would make one line with ours. A training under way has done so itself."""
    if path.exists():
        with suppress(BlockingIOError), locked(path.parent, wait=False):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read_scalars(path.parent) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _start_wandb(project: str, workdir: Path, config: Mapping | None):
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "config.log.wandb_project is set, but Weights & Biases is not installed: pip install wandb"
        ) from error
    # the id is derived from the directory, so that a resumed run goes on with its own curve
    where = workdir.resolve()
    return wandb.init(
        project=project, dir=workdir, name=where.name, id=f"{where.name}-{sha256_of_json(str(where))[:8]}",
        resume="allow", config=dict(config or {}),
    )  # fmt: skip
