"""Functions in other words: those written out in exponentials as what they are, whose slopes far out are no ∞ / ∞."""

from __future__ import annotations

from fantastic4.expression import Expr, const
from fantastic4.values import is_total

_ONE, _ZERO = const(1.0), const(0.0)


def _negative(u: Expr) -> Expr:
    return u.args[0] if u.op == "neg" else Expr("neg", (u,))


def _exponent_beside_one(expr: Expr) -> Expr | None:
    """u, of 1 + exp(u)."""
    if expr.op != "add":
        return None
    return next((b.args[0] for a, b in (expr.args, expr.args[::-1]) if a == _ONE and b.op == "exp"), None)


def _quotient(top: Expr, bottom: Expr) -> Expr | None:
    """Of what becomes the logistic function or the hyperbolic tangent."""
    u = _exponent_beside_one(bottom)
    if u is not None:
        e = Expr("exp", (u,))
        half = Expr("tanh", (Expr("mul", (const(0.5), u)),))
        if top in (Expr("expm1", (u,)), Expr("sub", (e, _ONE))):
            return half
        if top == Expr("sub", (_ONE, e)):
            return Expr("neg", (half,))
        if top == e:
            return Expr("logistic", (u,))
        share = Expr("logistic", (_negative(u),))
        return share if top == _ONE else Expr("mul", (top, share))
    # (exp(a) - exp(-a)) / (exp(a) + exp(-a)). With another exponent both may vanish, and be 0 / 0 in floats.
    both = top.op == "sub" and bottom.op == "add" and all(part.op == "exp" for part in top.args)
    if both and bottom.args in (top.args, top.args[::-1]):
        a, b = (part.args[0] for part in top.args)
        if b == _negative(a):
            return Expr("tanh", (a,))
    return None


def _softplus(u: Expr) -> Expr:
    far = Expr("log1p", (Expr("exp", (Expr("neg", (Expr("abs", (u,)),)),)),))
    return Expr("add", (Expr("max", (u, _ZERO)), far))


def _is_mask(expr: Expr) -> bool:
    """Whether it chooses between numbers, not all of them 0."""
    branches = expr.args[2:]
    if expr.op != "select" or not all(branch.op == "const" or _is_mask(branch) for branch in branches):
        return False
    return any(branch.op == "select" or branch.number for branch in branches)


def _under(mask: Expr, other: Expr) -> Expr:
    if mask.op == "const":
        return Expr("mul", (mask, other)) if mask.number else _ZERO
    return Expr("select", (*mask.args[:2], *(_under(branch, other) for branch in mask.args[2:])))


def _masked(a: Expr, b: Expr) -> Expr | None:
    """The product with a mask, 1 where x > 0 and 0 elsewhere, as a choice: it may go on where the mask jumps."""
    # Of zeros alone, what is hidden would not be seen any more; nor what is no number where the mask is 0.
    pairs = ((a, b), (b, a))
    return next((_under(mask, other) for mask, other in pairs if _is_mask(mask) and is_total(other)), None)


def known(expr: Expr) -> Expr:
    """The expression, or what it is equal to for all numbers: only the outermost operations are looked at."""
    if expr.op == "power" and expr.number == 1:
        return expr.args[0]
    if expr.op in ("add", "sub") and expr.args[1] == _ZERO:
        return expr.args[0]
    if expr.op in ("max", "min", "select") and expr.args[-1] == expr.args[-2]:  # the same on both sides
        return expr.args[-1]
    if expr.op == "mul":
        return _masked(*expr.args) or expr
    if expr.op == "exp" and expr.args[0].op == "sub" and _softplus(expr.args[0].args[0]) == expr.args[0].args[1]:
        return Expr("logistic", (expr.args[0].args[0],))  # as JAX writes the derivative of softplus
    if expr.op == "div":
        return _quotient(*map(known, expr.args)) or expr
    if expr.op in ("log", "log1p"):
        (inside,) = expr.args
        u = _exponent_beside_one(inside if expr.op == "log" else Expr("add", (_ONE, inside)))
        if u is not None and not (u.op == "neg" and u.args[0].op == "abs"):
            return _softplus(u)
    return expr
