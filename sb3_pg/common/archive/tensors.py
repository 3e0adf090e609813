"""Files of ``torch.save``: tensors in lists and dictionaries, read as numbers."""

import io
import sys
import zipfile
from typing import Any

import torch as th

from sb3_pg.common.archive.pickles import Call, Name, UnreadableError, read
from sb3_pg.common.archive.unpickling import MAKERS, Builder, ForeignError

#: torch's names for arrays of numbers.
_TYPES = {
    "DoubleStorage": th.float64,
    "FloatStorage": th.float32,
    "HalfStorage": th.float16,
    "BFloat16Storage": th.bfloat16,
    "LongStorage": th.int64,
    "IntStorage": th.int32,
    "ShortStorage": th.int16,
    "CharStorage": th.int8,
    "ByteStorage": th.uint8,
    "BoolStorage": th.bool,
}


def read_tensors(file: bytes) -> Any:
    """Return what ``torch.save`` wrote, on the CPU.

    :raises UnreadableError: the file is damaged, or packs more than its size
    :raises ForeignError: naming what it has beside tensors, numbers, texts and what SB3's policies are made with
    """
    with zipfile.ZipFile(io.BytesIO(file)) as records:
        names = records.namelist()
        if len(set(names)) < len(names) or sum(record.file_size for record in records.infolist()) > len(file):
            raise UnreadableError("the records of its tensors overlap or are compressed, which torch does not do")
        root = names[0].split("/")[0]
        if f"{root}/byteorder" in names and records.read(f"{root}/byteorder").decode() != sys.byteorder:
            raise UnreadableError("its numbers are of the other byte order")
        pickle = records.read(f"{root}/data.pkl")
        loaded: dict[str, th.Tensor] = {}

        def storage(key: Any) -> th.Tensor:
            _, kind, name, _, n = key
            if name not in loaded:
                loaded[name] = _numbers(records.read(f"{root}/data/{name}"), kind, n)
            return loaded[name]

        tree, _ = read(pickle)
        return Builder(len(file), _WITH_TENSORS, storage).build(tree)


def _numbers(record: bytes, kind: Name, n: int) -> th.Tensor:
    """Return a record as one row of numbers."""
    if kind.module != "torch" or kind.name not in _TYPES:
        raise ForeignError(str(kind))
    dtype = _TYPES[kind.name]
    if len(record) != n * dtype.itemsize:
        raise UnreadableError(f"{len(record)} bytes for {n} numbers of type {dtype}")
    return th.frombuffer(bytearray(record), dtype=dtype) if n else th.empty(0, dtype=dtype)


def _tensor(call: Call) -> th.Tensor:
    storage, offset, size, stride = call.arguments[:4]
    tensor = th.as_strided(storage, size, stride, offset)  # which keeps within the storage
    if tensor.numel() > storage.numel():
        raise ValueError("a tensor larger than its storage")
    return tensor


def _parameter(call: Call) -> th.Tensor:
    tensor = call.arguments[0]
    if not isinstance(tensor, th.Tensor):
        raise TypeError(f"a parameter that is a {type(tensor).__name__}")
    return tensor


_WITH_TENSORS = MAKERS | {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
}
