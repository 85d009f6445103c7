"""Pickles read as data, without calling or importing anything that they name.

A pickle is a program for a stack machine. :func:`read_pickle` runs that program with a machine of its own in which
every class, function and object is an inert record of its name and arguments. Whoever knows some of those names makes
something of their records (:mod:`vitgraft.models.tensor_records`); all others stay records.

A hostile pickle can neither run code nor take more memory than a bounded multiple of its size: memo and stack are
Python containers that hold what instructions put there, strings are no longer than the file, and the number of
instructions is bounded. Keys of dictionaries are texts and small integers, so that hashes cannot be made to collide.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

MAX_INSTRUCTIONS = 2_000_000
"""A published checkpoint with the state of its optimizer has some hundred thousand."""


class PickleError(ValueError):
    """Not a pickle, a damaged one, or one with instructions that no file of weights has."""


class ProgramError(PickleError):
    """Pickle that names a function to run programs, which no data needs; the text is that name."""


class Global(NamedTuple):
    """The name of a class or function."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Persistent(NamedTuple):
    """A reference to something outside of the pickle, such as torch's storages."""

    id: Any


@dataclass(slots=True, eq=False)
class Record:
    """Unevaluated call of a pickle: ``function(*args)``, with its state, and its items where it is a dictionary."""

    function: Any
    args: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.function) if isinstance(self.function, Global) else type(self.function).__name__


class BoundedStream:
    """The bytes of a file from where it stands to ``end``, as ``pickletools`` reads them.

    A file's own ``read`` makes room for as many bytes as it is asked for before it looks at how many there are.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._end = file, end

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._end - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline(max(0, self._end - self._file.tell()))


def read_pickle(stream: BinaryIO | BoundedStream, persistent: list[Any] | None = None) -> Any:
    """Return what the next pickle of ``stream`` holds; the stream then stands behind it.

    Numbers, texts, bytes, lists, tuples and dictionaries are themselves (ordered dictionaries and sets are dictionaries
    and lists), everything else is a :class:`Record`, a :class:`Global` or a :class:`Persistent`. The content may refer
    to itself.

    Args:
        stream: binary; its ``read`` must not make more room than there are bytes (``BytesIO``, ``BoundedStream``).
        persistent: takes the id of each :class:`Persistent`, in order.

    Raises:
        PickleError: damaged, too long, or with instructions that are not taken; ``ProgramError`` for one made to run
            programs.
    """
    machine = _Machine(persistent)
    count = 0
    try:
        for instruction, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type] # reads what is asked of it
            count += 1
            if count > MAX_INSTRUCTIONS:
                raise PickleError(f"a pickle of more than {MAX_INSTRUCTIONS:,} instructions")
            machine.run(instruction.name, argument)
        return machine.stack.pop()
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise PickleError(f"a damaged pickle ({type(error).__name__} behind {count} instructions)") from error


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_LITERAL = re.compile(r"(SHORT_)?(BIN)?(STRING|UNICODE|BYTES|INT|FLOAT)[128]?|LONG[14]?|BYTEARRAY8")
_LITERALS = {instruction.name for instruction in pickletools.opcodes if _LITERAL.fullmatch(instruction.name)}
_DICTIONARIES = (Global("collections", "OrderedDict"), Global("builtins", "dict"), Global("__builtin__", "dict"))
_BYTES = (Global("builtins", "bytes"), Global("__builtin__", "bytes"))
_PROGRAMS = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|pty|runpy|importlib|ctypes|code|webbrowser|commands)(\..*)?"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint)"
)
"""Names that only malicious files contain. They are never called here, but the user is warned."""
_ENCODE = Global("_codecs", "encode")


class _Machine:
    """The stack machine; each ``do_…`` is an instruction, or several, of ``pickletools``."""

    def __init__(self, persistent: list[Any] | None) -> None:
        self.persistent = persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        """The stacks below the marks."""
        self.memo: dict[int, Any] = {}
        self.allowance = 0
        """Remaining budget of copies: a part that is referenced many times could otherwise grow beyond the file."""

    def run(self, name: str, argument: Any) -> None:
        self.allowance += 1 + (len(argument) if isinstance(argument, str) else 0)
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        else:
            do = getattr(self, f"do_{name.lower()}", None)
            if do is None:
                raise PickleError(f"the instruction {name}, which no file of weights has")
            do(argument)

    def pay(self, count: int) -> None:
        self.allowance -= count
        if self.allowance < 0:
            raise PickleError("a pickle that copies its parts many times")

    def marked(self) -> list[Any]:
        """Return what stands above the last mark, and remove both."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def do_nothing(self, argument: Any) -> None:
        pass

    do_proto = do_frame = do_stop = do_nothing

    def do_mark(self, argument: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def do_pop(self, argument: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.outer.pop()

    def do_pop_mark(self, argument: Any) -> None:
        self.marked()

    def do_dup(self, argument: Any) -> None:
        self.stack.append(self.stack[-1])

    # The memo.

    def do_memoize(self, argument: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_put(self, index: int) -> None:
        if index.bit_length() > 64:
            raise PickleError("a memo index of more than 64 bits")
        self.memo[index] = self.stack[-1]

    do_binput = do_long_binput = do_put

    def do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_binget = do_long_binget = do_get

    # Containers.

    def do_list(self, argument: Any) -> None:
        items = self.marked()
        self.stack.append(items)

    do_frozenset = do_list

    def do_tuple(self, argument: Any) -> None:
        items = self.marked()
        self.stack.append(tuple(items))

    def do_tuple1(self, argument: Any) -> None:
        self.tuple_of(1)

    def do_tuple2(self, argument: Any) -> None:
        self.tuple_of(2)

    def do_tuple3(self, argument: Any) -> None:
        self.tuple_of(3)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def do_dict(self, argument: Any) -> None:
        items = self.marked()
        self.stack.append({})
        self.set_items(items)

    def do_setitem(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def do_setitems(self, argument: Any) -> None:
        self.set_items(self.marked())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        _fill(target.items if isinstance(target, Record) else target, zip(items[::2], items[1::2], strict=True))

    def do_append(self, argument: Any) -> None:
        value = self.stack.pop()
        self.extend([value])

    def do_appends(self, argument: Any) -> None:
        self.extend(self.marked())

    do_additems = do_appends

    def extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Record):  # a list of some class: only its name is of use
            raise TypeError

    # Names and objects: recorded, nothing more.

    def do_global(self, name: str) -> None:
        self.named(*name.split(" ", 1))

    def named(self, module: str, name: str) -> None:
        made = Global(module, name)
        if _PROGRAMS.fullmatch(module) or _PROGRAMS.fullmatch(str(made)):
            raise ProgramError(str(made))
        self.stack.append(made)

    def do_stack_global(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError
        self.named(module, name)

    def do_persid(self, argument: Any) -> None:
        self.stack.append(Persistent(argument))
        if self.persistent is not None:
            self.persistent.append(argument)

    def do_binpersid(self, argument: Any) -> None:
        self.do_persid(self.stack.pop())

    def do_reduce(self, argument: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.make(function, args)

    do_newobj = do_reduce

    def do_newobj_ex(self, argument: Any) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        del keywords
        self.make(function, args)

    def do_obj(self, argument: Any) -> None:
        function, *args = self.marked()
        self.make(function, tuple(args))

    def do_inst(self, name: str) -> None:
        args = tuple(self.marked())
        self.do_global(name)
        self.make(self.stack.pop(), args)

    def make(self, function: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise TypeError
        if function in _DICTIONARIES:
            made: dict[Any, Any] = {}
            pairs = args[0] if args else ()
            self.pay(len(pairs))
            _fill(made, pairs)
            self.stack.append(made)
        elif function == _ENCODE and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            self.pay(len(args[0]))
            self.stack.append(args[0].encode("latin1"))  # how protocol 2 writes bytes
        elif function in _BYTES and not args:
            self.stack.append(b"")  # and how it writes none
        else:
            self.stack.append(Record(function, args))

    def do_build(self, argument: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):  # what else an ordered dictionary carries is of no use
            raise TypeError


def _fill(target: dict[Any, Any], pairs: Any) -> None:
    for key, value in pairs:
        if isinstance(key, str) or (isinstance(key, int) and key.bit_length() < 64):
            target[key] = value
