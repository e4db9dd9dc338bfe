"""What a calibration has found so far, kept in a folder, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora import __version__
from chunkwise_lora.calibration.work import Progress, Work
from chunkwise_lora.files import write_atomically
from chunkwise_lora.ladder import RankLadder

logger = logging.getLogger(__name__)

Values = dict[str, Any]
"""Tensors, and values that JSON can hold, by name."""

SUFFIX = ".unfinished"
"""What the name of the folder adds to that of the output."""
FORMAT = 1
"""Version of the files."""
STEPS_BETWEEN = 10
"""Steps of gradient descent after which its state is kept."""
SAMPLE = 1024
"""Entries of every weight of the model that its fingerprint reads, evenly spread. All of them would take minutes for a
large model."""


class Unfinished:
    """The finished stages of one calibration.

    A stage is a file of tensors (safetensors), and a JSON file, which is written last. The JSON file holds all other
    values, a checksum, the fingerprint of the calibration, and the work that the stage took.

    Args:
        folder: Where to keep the stages; None keeps nothing.
        say: Is told what is found in the folder.
    """

    def __init__(self, folder: Path | None = None, say: Callable[[str], object] = logger.warning) -> None:
        self._folder = folder
        self._say = say
        self._fingerprint = ""
        self._progress = Progress(lambda *report: None)
        self._stages = 0

    @classmethod
    def beside(cls, output: Path, say: Callable[[str], object] = logger.warning) -> Unfinished:
        """Keep the stages of a calibration in a folder beside the one that it will write."""
        output = output.resolve()
        return cls(output.with_name(output.name + SUFFIX), say)

    @property
    def folder(self) -> Path | None:
        """Where the stages are kept, if anything is kept there."""
        return self._folder if self._folder is not None and self._folder.is_dir() else None

    def bind(self, fingerprint: str, progress: Progress) -> None:
        """Begin a calibration, or go on with it.

        If the folder holds stages with another fingerprint, they are removed.

        Args:
            fingerprint: Stands for all that decides the result.
            progress: Is told about the work of finished stages.
        """
        self._fingerprint, self._progress, self._stages = fingerprint, progress, 0
        if self.folder is None:
            return
        found = [self._record(path) for path in sorted(self.folder.glob("*.json"))]
        ours = [record is not None and record["fingerprint"] == fingerprint for record in found]
        others = [record is not None and record["fingerprint"] != fingerprint for record in found]
        if any(others) or (found and not any(ours)):
            why = "with other settings, text, adapter or model" if any(others) else "of which nothing can be read"
            self._say(f"{self.folder}: is left from a calibration {why}, and is removed")
            self.remove()
        elif found:
            self._say(f"{self.folder}: is left from this calibration, which goes on where it stopped")

    def remove(self) -> None:
        """Remove the folder, when the result has been saved."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def stage(self, name: str, run: Callable[[], Values]) -> Values:
        """Return what `run` returns, or what it returned before the interruption.

        Both are the same to the last bit. Stages are recognised by their order and name.
        """
        self._stages += 1
        file = f"{self._stages:02}-{name.replace(' ', '-')}"
        found = self._load(file)
        if found is None:
            with self._counted(file) as keep:
                found = run()
                keep(found)
        return _tidy(found)

    @contextmanager
    def descent(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Iterator[Descent]:
        """Keep the state of the gradient descent of the running stage every `STEPS_BETWEEN` steps."""
        file = f"{self._stages:02}-descent"
        with self._counted(file) as keep:
            yield Descent(optimizer, generator, self._load(file), keep)

    @contextmanager
    def _counted(self, file: str) -> Iterator[Callable[[Values], None]]:
        """Yields a function that keeps values, and the work that has been done since the beginning of the block."""
        before = self._progress.done

        def keep(values: Values) -> None:
            if self._folder is not None:
                self._save(self._folder / file, values, self._progress.done - before)

        yield keep

    def _save(self, path: Path, values: Values, work: Work) -> None:
        tensors = save({key: value for key, value in _tidy(values).items() if isinstance(value, Tensor)})
        others = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        record = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "checksum": _checksum(tensors, others),
            "values": others,
            "work": astuple(work),
        }
        write_atomically(path.with_suffix(".safetensors"), tensors)
        write_atomically(path.with_suffix(".json"), json.dumps(record, indent=1).encode())

    def _load(self, file: str) -> Values | None:
        """The values of a file, whose work is then done; None if there are none, or if they are damaged."""
        if self.folder is None or not (path := self.folder / f"{file}.json").is_file():
            return None
        try:
            record = self._record(path)
            if record is None:
                raise ValueError
            tensors = path.with_suffix(".safetensors").read_bytes()
            if record["checksum"] != _checksum(tensors, record["values"]):
                raise ValueError
        except (OSError, ValueError):
            self._say(f"{path}: is damaged; this stage runs again")
            return None
        self._progress.add(Work(*record["work"]))
        return {**load(tensors), **record["values"]}

    @staticmethod
    def _record(path: Path) -> dict[str, Any] | None:
        """The content of a JSON file; None if it is damaged."""
        try:
            record = json.loads(path.read_bytes())
            good = record["format"] == FORMAT and {"fingerprint", "checksum", "values", "work"} <= record.keys()
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record if good else None


@dataclass
class Descent:
    """The state of a gradient descent, before or after an interruption."""

    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """Draws what the steps need."""
    found: Values | None
    """The state that was kept."""
    keep: Callable[[Values], None]

    def restore(self) -> int:
        """Restore the state that was kept, if there is one; returns the number of steps that are done."""
        if self.found is None:
            return 0
        with torch.no_grad():
            for i, parameter in enumerate(self._parameters()):
                parameter.copy_(self.found[f"{i}/value"])
                kept = {name.split("/")[2]: self.found[name] for name in self.found if name.startswith(f"{i}/state/")}
                self.optimizer.state[parameter] = {  # as PyTorch does it, which counts steps on the CPU
                    name: value.clone() if name == "step" else value.to(parameter, copy=True)
                    for name, value in kept.items()
                }
        self.generator.set_state(self.found["generator"])
        return int(self.found["steps"])

    def finished(self, steps: int) -> None:
        """Keep the state after `steps` steps, if it is time for that."""
        if steps % STEPS_BETWEEN:
            return
        values: Values = {"steps": steps, "generator": self.generator.get_state()}
        for i, parameter in enumerate(self._parameters()):
            values[f"{i}/value"] = parameter.detach()
            values |= {f"{i}/state/{name}": value for name, value in self.optimizer.state[parameter].items()}
        self.keep(values)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def fingerprint(model: PreTrainedModel, ladder: RankLadder, settings: Mapping[str, Any], *texts: Tensor) -> str:
    """A checksum of all that decides the result of a calibration.

    Args:
        model: The base model, of whose weights a sample is read.
        ladder: The ladder that is calibrated.
        settings: The settings of calibration, as JSON can hold them.
        texts: Tensors that hold the texts.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, __version__, torch.__version__, settings], sort_keys=True).encode())
    digest.update(model.config.to_json_string().encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes(flat[:: max(1, len(flat) // SAMPLE)]))
    for name, module in ladder.modules.items():
        digest.update(f"{name} {module.up.dtype} {module.ranks}".encode())
        for tensor in (module.up, module.down, module.sigma):
            digest.update(_bytes(tensor))
    for name, tensor in ladder.saved_modules.items():
        digest.update(name.encode() + _bytes(tensor))
    for tensor in texts:
        digest.update(f"{tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _tidy(values: Values) -> Values:
    """The values with tensors in new memory on the CPU, so that they look the same after an interruption as before it.

    The memory layout of a tensor changes how products are rounded.
    """
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _checksum(tensors: bytes, values: Mapping[str, Any]) -> str:
    return hashlib.sha256(tensors + json.dumps(values, sort_keys=True).encode()).hexdigest()
