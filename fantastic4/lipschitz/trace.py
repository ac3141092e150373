"""The walk over a traced function: every operation by its rule, constants computed as JAX computes them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from fantastic4.expression import size
from fantastic4.lipschitz.entered import Entered
from fantastic4.lipschitz.graph import Label, Signal, UnboundedError
from fantastic4.lipschitz.nodes import settled
from fantastic4.lipschitz.operands import Comparison, Refused, at_once, evaluate, is_constant, is_known

_PATHS = sysconfig.get_paths()
# JAX and its kin by themselves too: in stacked environments, or with pip --user, they live elsewhere.
_SPECS = [importlib.util.find_spec(name) for name in ("jax", "jaxlib", "flax", "equinox", "haiku")]
_FOLDERS = [os.path.dirname(spec.origin) for spec in _SPECS if spec is not None and spec.origin]
_OWN = os.path.dirname(os.path.dirname(__file__))
_LIBRARIES = tuple(folder + os.sep for folder in (_PATHS["purelib"], _PATHS["stdlib"], _OWN, *_FOLDERS))

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""By the primitive's name: a function of the walk, the equation and its operands, which returns its results."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Put a function into the table, for primitives by their names."""

    def put(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return put


def of_complex(*names: str) -> Callable[[Rule], Rule]:
    """The same for what takes or makes complex numbers."""

    def put(function: Rule) -> Rule:
        _COMPLEX_RULES.update(dict.fromkeys(names, function))
        return function

    return put


_COMPLEX_RULES: dict[str, Rule] = {}

CALLS = (
    *("jit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"),
    *("scan", "while", "cond"),
)
"""Primitives whose rules walk through what they call, whatever their operands are."""

MOVES = (
    *("reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "split", "broadcast_in_dim"),
    *("unstack", "tile", "copy", "stop_gradient"),
)
"""Primitives that do to truth values what they do to numbers."""

_LINEAR = (
    *MOVES,
    *("concatenate", "pad", "gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice"),
    *("add", "add_any", "sub", "neg", "reduce_sum", "cumsum"),
)
"""Primitives whose rules hold for complex numbers as for real ones."""

_WRITES = {"WriteEffect", "AccumEffect"}  # JAX has no public names for them

_LARGEST = 100  # operations in one scalar function; what is nested deeper is bounded in parts

USER_RULES: dict[str, Rule] = {}


def shape_and_dtype(variable: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a variable of a jaxpr."""
    return tuple(variable.aval.shape), variable.aval.dtype


def _is_narrow(variable: Any) -> bool:
    """Whether numbers of moderate size are none in a variable's type, as 65,520 in float16, -1 in float8_e8m0fnu."""
    dtype = getattr(variable.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    info = jnp.finfo(dtype)
    return float(info.max) < 1e38 or float(info.min) > -1e38


def _is_complex(variable: Any) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", np.float32), jnp.complexfloating)


def out_shape(eqn: core.JaxprEqn) -> tuple[int, ...]:
    """Shape of the result of an equation that has one."""
    return shape_and_dtype(eqn.outvars[0])[0]


def _source(eqn: core.JaxprEqn) -> str:
    """The innermost line of the user's own code that led to an equation."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(_LIBRARIES) and not frame.file_name.startswith("<"):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num} in {frame.function_name}"
    return ""


class Made(NamedTuple):
    """What made a signal.

    Attributes:
      signal: it.
      how: the equation; or a function of what is known of its operands' sizes, where it is none.
      operands: of that.
      place: which of its results.
    """

    signal: Signal
    how: Any
    operands: tuple[Any, ...]
    place: int = 0


class Walk:
    """One walk: reads equations in order, and knows where it is.

    Attributes:
      made: what made each signal, by its identity.
      sizes: what is known of how large they are, by their identity, with them.
    """

    def __init__(self) -> None:
        self.made: dict[int, Made] = {}
        self.sizes: dict[int, tuple[Signal, Any]] = {}
        self.prefix: list[str] = []
        self.sources: list[str] = []
        self.joined: dict[Any, Signal] = {}
        self._done: dict[Any, tuple[Any, list[Any]]] = {}
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._constants: dict[Any, Any] = {}
        self.entered = Entered()
        self.written: Label | None = None

    def label(self, eqn: core.JaxprEqn, operation: str | None = None) -> Label:
        """The label of an equation."""
        name = "/".join(part for part in (*self.prefix, str(eqn.source_info.name_stack)) if part)
        # A function that JAX has traced before has no line of the user's: its caller has.
        source = _source(eqn) or next((source for source in reversed(self.sources) if source), "")
        return Label(operation or eqn.primitive.name, name, source)

    @contextlib.contextmanager
    def inside(self, eqn: core.JaxprEqn) -> Iterator[None]:
        """While the jaxpr of a call is walked through: names begin with the caller's."""
        self.prefix.append(str(eqn.source_info.name_stack))
        self.sources.append(_source(eqn))
        try:
            yield
        finally:
            self.prefix.pop()
            self.sources.pop()

    def jaxpr(self, jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr for operands that are constants or signals."""
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def closed(self, closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
        """The same for a closed jaxpr."""
        return self.jaxpr(closed.jaxpr, closed.consts, arguments)

    def equation(self, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        """Results of one equation; those of the same operands are the same.

        So ``net(x)[0] - net(x)[1]`` has one network, not two.
        """
        if _WRITES & {type(effect).__name__ for effect in eqn.effects}:
            self.written = self.written or self.label(eqn)
            return self.refuse(eqn, "writes to a mutable array")
        if eqn.effects:  # what a mutable array holds may have changed
            return self._results(eqn, operands)
        operands = list(map(self._first_equal, operands))
        key = (eqn.primitive, tuple(map(_identity, operands)), tuple((k, _identity(v)) for k, v in eqn.params.items()))
        if key not in self._done:
            # An identity is of objects that live: they are kept.
            self._done[key] = (operands, eqn.params), self._results(eqn, operands)
        return self._done[key][1]

    def _first_equal(self, value: Any) -> Any:
        """Of a known array the first that was equal to it: ``net`` may make its weights anew in each call."""
        if not is_known(value) or not isinstance(value, np.ndarray | Array):
            return value
        if value.ndim == 0 or not getattr(value, "is_fully_addressable", True):
            return value
        if id(value) not in self._contents:
            self._contents[id(value)] = value, _content(value)
        return self._constants.setdefault(self._contents[id(value)][1], value)

    def _results(self, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        name, given = eqn.primitive.name, operands
        if name == "pvary":  # in a shard_map: the same numbers, of which JAX keeps in mind that others vary
            return operands
        if all(map(is_constant, operands)):
            return evaluate(eqn, operands)
        if name not in CALLS:
            operands = [settled(o) if isinstance(o, Signal) and size(o.expr) > _LARGEST else o for o in operands]
        for operand in operands:
            if isinstance(operand, Refused) and name not in CALLS:
                return [operand] * len(eqn.outvars)
        rule = USER_RULES.get(name) or self._rule(eqn)
        comparisons = [o for o in operands if isinstance(o, Comparison)]
        if comparisons and name not in (*CALLS, "select_n", "not", "and", "or", "convert_element_type"):
            if name not in MOVES or len(operands) > 1 or rule is None:
                return self.refuse(eqn, "makes something else of a comparison, and a choice by that may jump")
            results = rule(self, eqn, [comparisons[0].of])
            results = results if isinstance(results, list) else [results]
            return [dataclasses.replace(comparisons[0], of=result) for result in results]
        if rule is None:
            return self.refuse(eqn, "has no rule: write one with fantastic4.lipschitz.register_rule")
        try:
            found = rule(self, eqn, operands)
        except UnboundedError as error:
            return [Refused(str(error))] * len(eqn.outvars)
        results = list(found) if isinstance(found, list | tuple) else [found]
        if name not in CALLS:
            for place, result in enumerate(results):
                self.remember(result, eqn, given, place)
        if name not in CALLS and not all(map(is_constant, results)):
            self.entered.meet(name, operands)
            if any(map(_is_narrow, eqn.outvars)):
                self.entered.strange()
        return results

    def remember(self, result: Any, how: Any, operands: Sequence[Any], place: int = 0) -> None:
        """Keep in mind what made a result; one that is an operand has been made before."""
        if isinstance(result, Signal) and not any(result is o for o in operands):
            self.made.setdefault(id(result), Made(result, how, tuple(operands), place))

    def _rule(self, eqn: core.JaxprEqn) -> Rule | None:
        name = eqn.primitive.name
        if name in CALLS or not any(map(_is_complex, (*eqn.invars, *eqn.outvars))):
            return RULES.get(name)
        refuse = lambda walk, eqn, operands: walk.refuse(eqn, "of complex numbers is not known: take its parts")  # noqa: E731
        return _COMPLEX_RULES.get(name) or (RULES.get(name) if name in _LINEAR else refuse)

    def refuse(self, eqn: core.JaxprEqn, why: str) -> list[Any]:
        """Results that nothing may depend on."""
        return [Refused(f"{self.label(eqn)} {why}")] * len(eqn.outvars)


def _content(array: Any) -> Any:
    """What equal arrays of one kind have in common, and no others: their bytes, and how JAX computes with them."""
    kind = type(array), array.shape, array.dtype, *(getattr(array, name, None) for name in ("weak_type", "sharding"))
    with at_once(array):
        numbers = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return kind, hashlib.sha256(np.ascontiguousarray(numbers).view(np.uint8)).digest()


def _identity(value: Any) -> Any:
    """What tells a value from others: numbers and names by themselves, all others as objects."""
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return type(value), value if value == value else "nan", str(value)
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return id(value)
