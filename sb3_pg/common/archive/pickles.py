"""Pickles, read as the texts that they are: nothing that one names is imported, called or changed.

A pickle is a program for a stack machine. Python's own machine calls what the program names. This one writes down what
would be called, and with what; :mod:`sb3_pg.common.archive.unpickling` then makes those objects that it knows.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class UnreadableError(ValueError):
    """A pickle that is not whole, or has what no file of ours or SB3's has."""


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Elsewhere(NamedTuple):
    """What lies outside the pickle (a "persistent id"), such as a tensor's numbers."""

    key: Any


@dataclass(eq=False)
class Call:
    """An object that a pickle makes: by calling something, then setting its state, then filling it."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


#: Instructions that put their own argument on the stack.
_VALUES = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
    + ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
    + ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = ("PROTO", "FRAME")

#: Modules whose old names pickles have up to protocol 2.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}

#: cloudpickle sets the state of a function by calling this with both, and drops the result.
_SET_STATE = "_function_setstate"


def read(pickle: bytes) -> tuple[Any, int]:
    """Return what a pickle says, and where it ends.

    Numbers, texts, bytes, lists, tuples, dictionaries and sets are themselves; the rest are :class:`Name`,
    :class:`Call` and :class:`Elsewhere`.

    :raises UnreadableError: it is not whole, or has an instruction that nothing of ours or SB3's needs
    """
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return machine.stack.pop(), (position or 0) + 1
            machine.do(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UnreadableError(f"the pickle is damaged ({error})") from None
    raise UnreadableError("the pickle has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self.popped(_TUPLES[name])))
        elif name not in _NOTHING:
            if name not in _INSTRUCTIONS:
                raise ValueError(f"the instruction {name}")
            _INSTRUCTIONS[name](self, argument)

    def popped(self, n: int) -> list[Any]:
        """Take the last ``n`` from the stack."""
        if not 0 <= n <= len(self.stack):
            raise ValueError("too little on the stack")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def since_mark(self) -> list[Any]:
        return self.popped(len(self.stack) - self.marks.pop())

    def do_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def do_pop(self, _: Any) -> None:
        self.stack.pop()

    def do_pop_mark(self, _: Any) -> None:
        self.since_mark()

    def do_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # ------------------------------------------------------------------- memo

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    do_binput = do_long_binput = do_put

    def do_get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    do_binget = do_long_binget = do_get

    # ------------------------------------------------------------- containers

    def do_list(self, _: Any) -> None:
        self.stack.append(self.since_mark())

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def do_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(self.since_mark()))

    def do_dict(self, _: Any) -> None:
        self.stack.append(_dict(self.since_mark()))

    def do_append(self, _: Any) -> None:
        self.fill(self.popped(1))

    def do_appends(self, _: Any) -> None:
        self.fill(self.since_mark())

    def do_additems(self, _: Any) -> None:
        items = self.since_mark()
        self.stack[-1].update(items)

    def fill(self, items: list[Any]) -> None:
        last = self.stack[-1]
        (last.items if isinstance(last, Call) else last).extend(items)

    def do_setitem(self, _: Any) -> None:
        self.set_items(self.popped(2))

    def do_setitems(self, _: Any) -> None:
        self.set_items(self.since_mark())

    def set_items(self, items: list[Any]) -> None:
        last = self.stack[-1]
        if isinstance(last, Call):
            last.pairs.extend(_dict(items).items())
        else:
            last.update(_dict(items))

    # ---------------------------------------------------------------- objects

    def do_global(self, argument: str) -> None:
        module, name = argument.split(" ")  # between them is what separates them in the listing
        self.stack.append(Name(_PYTHON_2.get(module, module), name))

    def do_stack_global(self, _: Any) -> None:
        module, name = self.popped(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        self.stack.append(Name(module, name))

    def do_binpersid(self, _: Any) -> None:
        self.stack.append(Elsewhere(self.stack.pop()))

    def do_reduce(self, _: Any) -> None:
        function, arguments = self.popped(2)
        if isinstance(function, Name) and function.name == _SET_STATE:
            function, state = arguments
            function.state = state
            self.stack.append(None)
        else:
            self.call(function, arguments, {})

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        self.call(*self.popped(3))

    def call(self, function: Any, arguments: Any, keywords: Any) -> None:
        if not isinstance(arguments, tuple) or not isinstance(keywords, dict):
            raise ValueError("a call without arguments")
        self.stack.append(Call(function, arguments, keywords))

    def do_build(self, _: Any) -> None:
        (state,) = self.popped(1)
        target = self.stack[-1]
        if not isinstance(target, Call) or target.state is not None:
            raise ValueError("a state of what has none")
        target.state = state


_INSTRUCTIONS = {name[3:].upper(): does for name, does in vars(_Machine).items() if name.startswith("do_")}


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
