"""Mutations of JSON and safetensors files for fuzz tests. They know the structure of the files."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

NAMES = [
    "",
    ".",
    "..",
    "a.b",
    "r",
    "ranks",
    "lora_A.weight",
    "base_model.model.x.lora_A.weight",
    "base_model.model.x.lora_B.default.weight",
    "base_model.model.lm_head.weight",
    "saved_modules/lm_head.weight",
    "learned/token",
    "sigma/x",
    "__metadata__",
    "x/up",
    "\x1b[31mred",
    "[bold]",
    "\u202eabc",
    "a\nb",
    "a\0b",
    "../../etc/passwd",
    "x" * 3000,
    "a." * 300,
]

EXPRESSIONS = [
    r"([a-z0-9_.]+)+!",
    r"(.*a){20}",
    r"(a|a)*b",
    r".*q_proj",
    r"layers\.\d+.*",
    "(",
    r"(\w)\1",
    "((a{60}){60}){60}",
    "q_proj",
    ".",
    "",
    "(?i)q",
]

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 4.0, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400),
    *("", "8", "svd", "LORA", "\ud800", "\x1b[2J", "x" * 10_000, "\0", "../x.safetensors"),
    *([], {}, [[]], [None], ["lm_head"], [0, 2, 4], [0] * 300, {"q_proj": 2}, {"": 0}, {"a": {"b": {"c": [1, 2]}}}),
    *({one: 2} for one in EXPRESSIONS),
]

DTYPES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "U32": 4, "C64": 8},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 1, "Q4": 1, "": 1},
}

NUMBERS = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-45, 1e-30, 1e15, 1e18, 1e25, 3e38]


def mutate_bytes(content: bytes, draw: Random) -> bytes:
    """Truncate the file, append to it, or change single bytes."""
    place = draw.randrange(len(content) + 1)
    kind = draw.randrange(5)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + draw.randbytes(draw.choice([1, 8, 1000]))
    if kind == 2:
        return content[:place] + draw.randbytes(draw.choice([1, 4])) + content[place:]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 5])):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def mutate_json(content: bytes, draw: Random, times: int = 1) -> bytes:
    """Change values, names and structure, and sometimes bytes of the text."""
    if draw.random() < 0.08:
        return mutate_bytes(content, draw)
    if draw.random() < 0.02:
        return draw.choice([b"", b"null", b"[]", b'"x"', b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe"])
    try:
        root = json.loads(content)
    except ValueError:
        return content
    for _ in range(times):
        _change(root, draw)
    text = json.dumps(root, indent=draw.choice([None, 1]))
    if draw.random() < 0.05 and text.startswith("{") and len(text) > 2:
        key = json.dumps(draw.choice(list(root) if isinstance(root, dict) and root else ["r"]))
        text = f"{{{key}: {json.dumps(draw.choice(VALUES))}, {text[1:]}"  # the same key twice
    return (b"\xef\xbb\xbf" if draw.random() < 0.02 else b"") + text.encode()


def _change(root: Any, draw: Random) -> None:
    places = list(_places(root))
    if not places:
        return
    parent, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind <= 3:
        parent[key] = deepcopy(draw.choice(VALUES))
    elif kind == 4 and type(parent[key]) in (int, float):
        parent[key] = draw.choice([parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 2, str(parent[key])])
    elif kind == 5 and isinstance(parent, dict):
        parent[draw.choice(NAMES + EXPRESSIONS)] = parent.pop(key)
    elif kind == 6:
        other, name = draw.choice(places)
        parent[key] = deepcopy(other[name])
    elif isinstance(parent, dict):
        parent[draw.choice(NAMES + EXPRESSIONS)] = deepcopy(draw.choice(VALUES))
    else:
        parent.insert(key, deepcopy(draw.choice([*VALUES, parent[key]])))


def _places(node: Any) -> Any:
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


class RawTensor(NamedTuple):
    """One tensor as it is stored in a file."""

    dtype: str
    shape: list[int]
    data: bytes


def unpack(content: bytes) -> dict[str, RawTensor]:
    """The tensors of a valid safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return {
        name: RawTensor(one["dtype"], one["shape"], data[slice(*one["data_offsets"])])
        for name, one in header.items()
        if name != "__metadata__"
    }


def pack(tensors: dict[str, RawTensor], draw: Random | None = None) -> bytes:
    """A safetensors file. With `draw`, its header contradicts its data."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [len(data), len(data) + len(tensor.data)],
        }
        data += tensor.data
    if draw is not None and header:
        _lie(header, draw)
    text = json.dumps(header)
    if draw is not None and header and draw.random() < 0.1:
        name = draw.choice(list(header))
        text = f"{{{json.dumps(name)}: {json.dumps(header[name])}, {text[1:]}"
    content = text.encode()
    length = len(content)
    if draw is not None and draw.random() < 0.1:
        length = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1])
    return struct.pack("<Q", length) + content + data


def _lie(header: dict[str, Any], draw: Random) -> None:
    one = header[draw.choice(list(header))]
    field = draw.choice(["dtype", "shape", "data_offsets"])
    if field == "dtype":
        one["dtype"] = draw.choice(list(DTYPES))
    elif field == "shape" or draw.random() < 0.3:
        one[field] = draw.choice(
            [[], [0], [-1, 4], [2**62, 4], [1] * 70, one["shape"][::-1], None, "x", [1.5], [2**64]]
        )
    else:
        start, end = one["data_offsets"]
        one[field] = draw.choice([[start + 1, end], [start, end + 4], [end, start], [0, 4], [start, 2**63], [-8, end]])


def mutate_tensors(content: bytes, draw: Random, times: int = 1) -> bytes:
    """Change names, dtypes, shapes and numbers. The file usually stays well-formed."""
    if draw.random() < 0.05:
        return mutate_bytes(content, draw)
    tensors = unpack(content)
    for _ in range(times):
        if tensors:
            _change_tensor(tensors, draw)
    return pack(tensors, draw if draw.random() < 0.12 else None)


def _change_tensor(tensors: dict[str, RawTensor], draw: Random) -> None:
    name = draw.choice(list(tensors))
    tensor = tensors[name]
    kind = draw.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[draw.choice([*NAMES, *(f"{name}{end}" for end in (".x", " ", "."))])] = tensors.pop(name)
    elif kind == 2:
        tensors[draw.choice([*NAMES, name.replace("lora_A", "lora_A.other"), name.upper()])] = tensor
    elif kind == 3:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == 4:
        tensors[name] = _filled(draw.choice(list(DTYPES)), tensor.shape, draw)
    elif kind == 5:
        shape = list(tensor.shape)
        if shape and draw.random() < 0.7:
            place = draw.randrange(len(shape))
            shape[place] = max(0, draw.choice([0, 1, shape[place] + 1, shape[place] - 1, 7, 40]))
        else:
            shape = draw.choice([[], [0], [1], [*shape, 1], [1, *shape], shape[::-1], shape[:-1]])
        tensors[name] = _filled(tensor.dtype, shape, draw)
    elif tensor.dtype == "F32" and tensor.data:
        numbers = list(struct.unpack(f"<{len(tensor.data) // 4}f", tensor.data))
        value = draw.choice(NUMBERS)
        if kind == 6:
            numbers[draw.randrange(len(numbers))] = value
        else:
            numbers = [value if draw.random() < 0.9 else number for number in numbers]
        tensors[name] = tensor._replace(data=struct.pack(f"<{len(numbers)}f", *numbers))


def _filled(dtype: str, shape: list[int], draw: Random) -> RawTensor:
    """A tensor of the right number of bytes: zeros, float32 ones or random bytes."""
    count = DTYPES.get(dtype, 1)
    for size in shape:
        count *= size
    fill = draw.choice([b"\0\0\0\0", b"\0\0\x80\x3f", draw.randbytes(16)])
    return RawTensor(dtype, shape, (fill * (count // len(fill) + 1))[:count])
