"""The weights a PyTorch checkpoint's pickle describes, found without running it.

A pickle is a program: it imports what it names and calls it. Here it is only parsed (by `pickletools`, which executes
nothing), onto inert values: the name of a class or function stays a name, and the few calls that make up a state dict
are recognised by that name. Anything else, such as Lightning's hyper-parameters, becomes a placeholder, which does no
harm unless it stands where a weight should.

Every function raises `ValueError` with the rest of a sentence whose subject is the file.
"""

import math
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")
"""Where training programs put the weights in a checkpoint, the first being Lightning's."""
MAX_OPCODES = 1_000_000
"""Of one pickle; a tensor takes about 30, with its optimizer state about 100."""
MAX_STACK = 100_000
MAX_NESTING = 1_000
MAX_AXES = 32

_DTYPES: Mapping[str, tuple[str, np.dtype]] = {  # torch's name -> its typed storage, ours
    "float64": ("DoubleStorage", np.dtype(np.float64)),
    "float32": ("FloatStorage", np.dtype(np.float32)),
    "float16": ("HalfStorage", np.dtype(np.float16)),
    "bfloat16": ("BFloat16Storage", np.dtype(ml_dtypes.bfloat16)),
    "int64": ("LongStorage", np.dtype(np.int64)),
    "int32": ("IntStorage", np.dtype(np.int32)),
    "int16": ("ShortStorage", np.dtype(np.int16)),
    "int8": ("CharStorage", np.dtype(np.int8)),
    "uint64": ("UInt64Storage", np.dtype(np.uint64)),
    "uint32": ("UInt32Storage", np.dtype(np.uint32)),
    "uint16": ("UInt16Storage", np.dtype(np.uint16)),
    "uint8": ("ByteStorage", np.dtype(np.uint8)),
    "bool": ("BoolStorage", np.dtype(np.bool_)),
}
_TORCH_DTYPES: Mapping[str, np.dtype] = {f"torch.{name}": dtype for name, (_, dtype) in _DTYPES.items()}
_STORAGE_DTYPES: Mapping[str, np.dtype] = {f"torch.{storage}": dtype for storage, dtype in _DTYPES.values()}
_UNTYPED_STORAGES = ("torch.storage.UntypedStorage", "torch.storage._UntypedStorage", "torch.UntypedStorage")


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """An entry of the archive: `numel` elements of `dtype`, or bytes where there is none."""

    key: str
    dtype: np.dtype | None
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """A tensor as torch stores it: strides and offset into a storage, in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor, not of its storage."""
        return math.prod(self.shape) * self.dtype.itemsize

    def problem(self, available: int) -> str | None:
        """Why the view cannot be read from a storage of `available` bytes; None if it can."""
        itemsize = 1 if self.storage.dtype is None else self.storage.dtype.itemsize
        if self.storage.numel * itemsize != available:
            return f"claims a storage of {self.storage.numel * itemsize} bytes but has {available}"
        if available % self.dtype.itemsize or self.offset > available // self.dtype.itemsize:
            return "does not fit its storage"
        if 0 in self.shape:
            return None
        last = self.offset  # the reach of the axes passed so far, from the innermost outwards
        for stride, n in sorted((stride, n) for stride, n in zip(self.strides, self.shape, strict=True) if n > 1):
            if stride <= last - self.offset:
                return "has overlapping elements; save it after .contiguous()"
            last += stride * (n - 1)
        return "reaches outside its storage" if last >= available // self.dtype.itemsize else None

    def of(self, raw: np.ndarray, *, big_endian: bool) -> np.ndarray:
        """A copy of the elements, contiguous and in native byte order, from the bytes of the storage."""
        itemsize = self.dtype.itemsize
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if big_endian:
            raw = np.ascontiguousarray(raw.reshape(-1, itemsize)[:, ::-1]).reshape(-1)
        flat = raw.view(self.dtype)[self.offset :]
        strides = tuple(stride * itemsize if n > 1 else 0 for stride, n in zip(self.strides, self.shape, strict=True))
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides), order="C")


def parse_weights(pickle: bytes) -> tuple[dict[str, TensorView], set[str]]:
    """The named tensors of a checkpoint, and the keys of all storages it refers to (those of its optimizer as well).

    Args:
        pickle: the `data.pkl` of a file written by `torch.save`.

    Raises:
        ValueError: a damaged or oversized pickle, no mapping of names to tensors, or a weight that is something else.
    """
    parser = _PickleParser()
    return _weights(parser.parse(pickle)), parser.storage_keys


def _weights(top: object) -> dict[str, TensorView]:
    """The mapping of names to tensors: the top of the checkpoint, or what its usual names for it hold."""
    if not isinstance(top, _Mapping):
        raise ValueError(f"holds {_said(top)} instead of weights; save model.state_dict()")
    found = [key for key in WEIGHT_KEYS if _has_tensors(top.items.get(key))]
    if len(found) > 1:
        raise ValueError(f"may hold its weights under {' or '.join(found)}; save the state dict alone")
    weights = top.items[found[0]] if found else top
    assert isinstance(weights, _Mapping)
    twice = next(iter([key for key in top.repeated if key in found] + weights.repeated), None)
    if twice is not None:
        raise ValueError(f"tensor {quoted(twice)} occurs twice; the files must hold each tensor once")
    if weights.odd_key is not None:
        raise ValueError(f"weights are named by {weights.odd_key}, not by a string")
    views = {}
    for name, view in weights.items.items():
        if not isinstance(view, TensorView):
            raise ValueError(f"weight {quoted(name)} is {_said(view)}, not a tensor that can be read")
        views[name] = view
    return views


def _has_tensors(value: object) -> bool:
    return isinstance(value, _Mapping) and any(isinstance(item, TensorView) for item in value.items.values())


def quoted(name: str) -> str:
    """A name from a file, fit to be printed: no line breaks or lone surrogates, not too long."""
    return ascii(name) if len(name) <= 100 else f"{name[:100]!a}..."


def is_size(value: object) -> bool:
    """Whether a number from a file can be a size, an offset or a stride."""
    return type(value) is int and 0 <= value < 2**63


def is_shape(value: object) -> bool:
    """Whether NumPy can hold an array of this shape; an empty one too bounds the product of its other axes."""
    if not isinstance(value, list | tuple) or len(value) > MAX_AXES or not all(map(is_size, value)):
        return False
    return math.prod(n for n in value if n) < 2**48


# --- inert values ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Inert:
    """A value of a class we do not build, or that is not what it should be; harmless unless it is a weight."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class _Global:
    """The name of a class or function. Nothing looks it up."""

    name: str


class _Mapping:
    """A dict or OrderedDict. Only string keys are kept; others are not even hashed, as nested ones would recurse."""

    __slots__ = ("items", "odd_key", "repeated")

    def __init__(self):
        self.items: dict[str, object] = {}
        self.repeated: list[str] = []
        self.odd_key: str | None = None

    def update(self, flat: list[object]) -> None:
        if len(flat) % 2:
            raise ValueError("its pickle is damaged (a key without a value)")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str):
                self.odd_key = _said(key)
            elif key in self.items:
                self.repeated.append(key)
            else:
                self.items[key] = value


def _said(value: object) -> str:
    if isinstance(value, _Inert):
        return value.what
    if isinstance(value, _Global):
        return f"the name {quoted(value.name)}"
    return "a mapping" if isinstance(value, _Mapping) else f"a Python {type(value).__name__}"


# --- the parser ------------------------------------------------------------------------------------------------------


class _PickleParser:
    """Parses one pickle into inert values: the opcodes of protocols 0 to 5 on a stack, with a memo, and no imports.

    What is understood is what weights consist of: scalars, strings, lists, tuples, mappings and torch's own way of
    naming tensors. Any other object becomes `_Inert`, whatever its class wants to be called with.
    """

    def __init__(self):
        self.storage_keys: set[str] = set()
        self._stack: list[object] = []
        self._marked: list[list[object]] = []  # the stacks below the open marks
        self._memo: dict[int, object] = {}

    def parse(self, pickle: bytes) -> object:
        """The value the pickle describes."""
        stop = -1
        for count, (opcode, argument, stop) in enumerate(_opcodes(pickle)):
            if count > MAX_OPCODES or len(self._stack) > MAX_STACK or len(self._marked) > MAX_NESTING:
                raise ValueError(f"its pickle is over {MAX_OPCODES} opcodes long or {MAX_NESTING} deep")
            try:
                self._step(opcode.name, argument)
            except (IndexError, KeyError) as error:  # the stack or the memo does not hold what the opcode needs
                raise ValueError(f"its pickle is damaged ({opcode.name} at byte {stop})") from error
        if self._marked or len(self._stack) != 1 or stop != len(pickle) - 1:
            raise ValueError("its pickle is damaged (it ends too early)")
        return self._stack[0]

    def _step(self, name: str, argument: object) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "POP":
                self._pop(1) if stack else self._since_mark()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[_memo_key(argument)])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[_memo_key(argument)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8" | "BYTEARRAY8":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case _:
                self._build(name, argument)

    def _build(self, name: str, argument: object) -> None:
        match name:
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._stack.append(tuple(self._pop(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(name))))
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self._stack.append({"EMPTY_LIST": list, "EMPTY_DICT": _Mapping}.get(name, _some_set)())
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self._since_mark()
                made = {"TUPLE": tuple, "LIST": list}.get(name, _some_set)
                self._stack.append(_mapping_of(items) if name == "DICT" else made(items))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if name == "APPEND" else self._since_mark()
                if isinstance(target := self._target(list), list):
                    target.extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._since_mark()
                if isinstance(target := self._target(_Mapping), _Mapping):
                    target.update(items)
            case "BUILD":  # attributes of an object; those of a state dict are versions of modules
                self._pop(1)
                self._target(_Mapping)
            case _:
                self._make(name, argument)

    def _make(self, name: str, argument: object) -> None:
        """The opcodes by which a pickle imports and calls. Here they only name."""
        match name:
            case "GLOBAL":
                made = _Global(str(argument).replace(" ", ".", 1))
            case "STACK_GLOBAL":
                made = _Global(".".join(part if isinstance(part, str) else "?" for part in self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                made = _called(*self._pop(2))
            case "NEWOBJ_EX":
                made = _object_of(self._pop(3)[0])
            case "INST":
                self._since_mark()
                made = _object_of(_Global(str(argument).replace(" ", ".", 1)))
            case "OBJ":
                made = _object_of(self._since_mark()[0])
            case "BINPERSID":
                (persistent_id,) = self._pop(1)
                made = _storage(persistent_id)
                if isinstance(persistent_id, tuple):  # also where its dtype is unknown: an optimizer may need it
                    self.storage_keys |= {key for key in persistent_id[2:3] if isinstance(key, str)}
            case _:
                raise ValueError(f"its pickle uses {name}, which torch.save does not")
        self._stack.append(made)

    def _pop(self, n: int) -> list[object]:
        if len(self._stack) < n:
            raise IndexError(n)
        popped = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        return popped

    def _since_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _target(self, kind: type) -> object:
        """The container on top of the stack that receives items or attributes: of a kind we build, or inert."""
        target = self._stack[-1]
        if not isinstance(target, kind | _Inert):
            raise KeyError(kind.__name__)
        return target


def _opcodes(pickle: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]:
    try:
        yield from pickletools.genops(pickle)
    except Exception as error:  # it documents none, and raises whatever decoding the damaged argument raises
        raise ValueError(f"its pickle is damaged ({quoted(str(error))})") from error


def _memo_key(argument: object) -> int:
    # Small ones only, as picklers number them: huge ones can be chosen to collide in the memo's hash table.
    if isinstance(argument, int) and 0 <= argument < MAX_OPCODES:
        return argument
    raise KeyError(argument)


def _some_set(*_: object) -> _Inert:
    return _Inert("a set")


def _mapping_of(flat: list[object]) -> _Mapping:
    mapping = _Mapping()
    mapping.update(flat)
    return mapping


def _object_of(callee: object) -> _Inert:
    return _Inert(
        f"an object of {quoted(callee.name)}" if isinstance(callee, _Global) else "an object of no known class"
    )


def _called(callee: object, arguments: object) -> object:
    """What a call would return, for the few functions that make up a state dict; nothing is called."""
    name = callee.name if isinstance(callee, _Global) else None
    match name, arguments:
        case "collections.OrderedDict", ():
            return _Mapping()
        case "collections.OrderedDict", ([*pairs],) if all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            return _mapping_of([item for pair in pairs for item in pair])
        case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, _, _, *metadata):
            return _view(storage, storage.dtype, offset, shape, strides, metadata)
        case "torch._utils._rebuild_tensor_v3", (Storage() as storage, offset, shape, strides, _, _, dtype, *metadata):
            dtype = _TORCH_DTYPES.get(dtype.name) if isinstance(dtype, _Global) else None
            return _view(storage, dtype, offset, shape, strides, metadata)
        case "torch._utils._rebuild_parameter", (TensorView() as view, _, _):
            return view
        case "torch._utils._rebuild_parameter_with_state", (TensorView() as view, _, _, _):
            return view
        case str(), (_Inert() as reason, *_) if name.startswith("torch._utils._rebuild_"):
            return reason  # rather than that its parameter or tensor cannot be read
    return _object_of(callee)


def _storage(persistent_id: object) -> Storage | _Inert:
    match persistent_id:
        case ("storage", _Global() as kind, str(key), _, numel) if is_size(numel):
            if kind.name in _UNTYPED_STORAGES:
                return Storage(key, None, numel)
            if kind.name in _STORAGE_DTYPES:
                return Storage(key, _STORAGE_DTYPES[kind.name], numel)
            return _Inert(f"a tensor in the unknown storage {quoted(kind.name)}")
    return _Inert("a persistent object that is no storage")


def _view(
    storage: Storage, dtype: np.dtype | None, offset: object, shape: object, strides: object, metadata: list[object]
) -> TensorView | _Inert:
    if dtype is None:
        return _Inert("a tensor of unknown dtype")
    if any(found is not None and not (isinstance(found, _Mapping) and not found.items) for found in metadata):
        return _Inert("a tensor with metadata (conjugated or negated lazily)")
    match offset, shape, strides:
        case int(), tuple(), tuple() if is_shape(shape) and len(shape) == len(strides) and is_size(offset):
            if all(map(is_size, strides)):
                return TensorView(storage, dtype, offset, shape, strides)
    return _Inert("a tensor with an impossible shape, stride or offset")
