"""float16 inside local functions, branches and loops is stored like all other float16.

Covers: exporters/functions.py, exporters/nested.py, exporters/storage.py,
    exporters/typed_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, SparseTensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from onnx.reference import ReferenceEvaluator

from clipdeploy.core.errors import GraphError
from exporters.graphs import load_graph, write_model
from exporters.headers import weight_files
from exporters.nested import all_graphs
from exporters.overflow import check_storage, largest_values, stored_session
from exporters.passes.fp16 import ToFloat16
from exporters.products import find_products, tensor_types
from exporters.session import OnnxSession
from exporters.signature import stores_float16

OPSETS = '<ir_version: 10, opset_import: ["" : {opset}, "l" : 1, "com.microsoft" : 1]>'

# Values whose products with `up` overflow float16, whose products with `down` underflow, and that
# need more than eleven bits.
VALUES = np.asarray(
    [0.0, 1.0, -1.0009, 3.14159, 700.3, -65504.0, 6e-5, 1e-7, 2049.0, 0.3333, -12345.6, 0.1],
    np.float32,
)

# float16 goes in and comes out of each; nothing but its insides can round or overflow.
CASES = {
    "a function": """
        g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) z = l.F(h) y = Cast<to=1>(z) }
        <domain: "l", opset_import: ["" : 21]>
        F (v) => (w) { k = Constant<value: tensor = float16[1] {1000}>() a = Mul(v, k)
                       w = Div(a, k) }
        """,
    "a function that casts": """
        g (float[N] x) => (float[N] y) { y = l.F(x) }
        <domain: "l", opset_import: ["" : 21]>
        F (v) => (w) { a = Cast<to=10>(v) b = Mul(a, a) w = Cast<to=1>(b) }
        """,
    "a function in a function": """
        g (float[N] x) => (float[N] y) { y = l.F(x) }
        <domain: "l", opset_import: ["" : 21]>
        G (v) => (w) { s = Abs(v) r = Sqrt(s) w = Mul(r, v) }
        <domain: "l", opset_import: ["" : 21, "l" : 1]>
        F (v) => (w) { a = Cast<to=10>(v) b = l.G(a) c = l.G(b) w = Cast<to=1>(c) }
        """,
    "a type that the caller names": """
        g (float[N] x) => (float[N] y) { y = l.F<kind = 10>(x) }
        <domain: "l", opset_import: ["" : 21]>
        F <kind> (v) => (w) { a = Cast<to: int = @kind>(v) b = Mul(a, a) w = CastLike(b, v) }
        """,
    "a number that the caller names": """
        g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) z = l.F<k = 0.001>(h)
                                         y = Cast<to=1>(z) }
        <domain: "l", opset_import: ["" : 21]>
        F <k: float = 1.0> (v) => (w) { c = Constant<value_float: float = @k>() d = CastLike(c, v)
                                        a = Mul(v, d) w = Div(a, d) }
        """,
    "a branch in a function": """
        g (float[N] x, bool c) => (float[N] y) { h = Cast<to=10>(x) z = l.F(h, c)
                                                 y = Cast<to=1>(z) }
        <domain: "l", opset_import: ["" : 21]>
        F (v, c) => (w) {
            u = Mul(v, v)
            w = If(c) <then_branch = t () => (o) { a = Sqrt(u) o = Mul(a, u) },
                       else_branch = e () => (p) { p = Add(u, v) }>
        }
        """,
    "a branch": """
        g (float[N] x, bool c) => (float[N] y) {
            h = Cast<to=10>(x)
            z = If(c) <then_branch = t () => (float16[N] o) { a = Mul(h, h) o = Div(a, h) },
                       else_branch = e () => (float16[N] p) { b = Add(h, h) p = Mul(b, h) }>
            y = Cast<to=1>(z)
        }
        """,
    "a branch with a function": """
        g (float[N] x, bool c) => (float[N] y) {
            y = If(c) <then_branch = t () => (float[N] o) { o = l.F(x) },
                       else_branch = e () => (float[N] p) { q = l.F(x) p = l.F(q) }>
        }
        <domain: "l", opset_import: ["" : 21]>
        F (v) => (w) { a = Cast<to=10>(v) b = Mul(a, a) w = Cast<to=1>(b) }
        """,
    "a branch in a branch, with names that both have": """
        g (float[N] x, bool c) => (float[N] y) {
            h = Cast<to=10>(x)
            z = If(c) <then_branch = t () => (float16[N] o) {
                    a = Mul(h, h)
                    d = Not(c)
                    o = If(d) <then_branch = tt () => (float16[N] q) { q = Neg(a) },
                               else_branch = te () => (float16[N] r) { s = Add(a, h)
                                                                       r = Mul(s, s) }> },
                       else_branch = e () => (float16[N] o2) { a = Add(h, h) o2 = Mul(a, h) }>
            y = Cast<to=1>(z)
        }
        """,
    "a loop": """
        g (float[N] x) => (float[N] y) {
            n = Constant<value_int = 3>()
            h = Cast<to=10>(x)
            yes = Constant<value: tensor = bool[1] {1}>()
            shape = Constant<value: tensor = int64[0] {}>()
            go = Reshape(yes, shape)
            z = Loop(n, go, h) <body = b (int64 i, bool go_in, float16[N] v)
                                       => (bool go_out, float16[N] w) {
                go_out = Identity(go_in)
                s = Add(v, h)
                w = Mul(s, v) }>
            y = Cast<to=1>(z)
        }
        """,
    "a scan": """
        g (float[N] x) => (float[N] y) {
            h = Cast<to=10>(x)
            zero = Constant<value: tensor = float16[1] {0}>()
            shape = Constant<value: tensor = int64[0] {}>()
            start = Reshape(zero, shape)
            last, z = Scan<num_scan_inputs = 1, body = b (float16 sum, float16 v)
                                       => (float16 next, float16 w) {
                next = Add(sum, v)
                w = Mul(next, v) }>(start, h)
            y = Cast<to=1>(z)
        }
        """,
    "a sequence": """
        g (float[N] x) => (float[M] y) {
            h = Cast<to=10>(x)
            s = SequenceConstruct(h, h)
            m = SequenceMap(s) <body = b (float16[N] v) => (float16[N] w) { q = Mul(v, v)
                                                                     w = Div(q, v) }>
            z = ConcatFromSequence<axis = 0>(m)
            y = Cast<to=1>(z)
        }
        """,
    "an empty sequence of float16": """
        g (float[N] x) => (float[N] y) {
            h = Cast<to=10>(x)
            e = SequenceEmpty<dtype = 10>()
            s = SequenceInsert(e, h)
            zero = Constant<value_int = 0>()
            a = SequenceAt(s, zero)
            z = Mul(a, a)
            y = Cast<to=1>(z)
        }
        """,
    "constants and fills": """
        g (float[N] x) => (float[N] y) {
            h = Cast<to=10>(x)
            s = Shape(h)
            c = ConstantOfShape<value: tensor = float16[1] {3}>(s)
            k = Constant<value: tensor = float16[1] {7}>()
            a = Div(h, k)
            z = Mul(a, c)
            y = Cast<to=1>(z)
        }
        """,
    "an optional output that nobody reads": """
        g (float[N] x) => (float[N] y) {
            h = Cast<to=10>(x)
            a, = Dropout(h)
            z, mask = Dropout(a)
            b = Mul(z, z)
            y = Cast<to=1>(b)
        }
        """,
    "nothing inside": """
        g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) z = Mul(h, h) y = Cast<to=1>(z) }
        """,
}


def parsed(text: str, opset: int = 21) -> ModelProto:
    return onnx.parser.parse_model(OPSETS.format(opset=opset) + text)


def saved(model: ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "g.onnx")
    return folder / "g.onnx"


def as_stored(path: Path, choice: bool | None = None) -> NDArray[np.float32]:
    extra = {} if choice is None else {"c": np.asarray(choice)}
    return stored_session(path).run(VALUES, extra)[0]


def choices(model: ModelProto) -> list[bool | None]:
    return [True, False] if len(model.graph.input) > 1 else [None]


def in_float16(model: ModelProto, choice: bool | None) -> NDArray[np.float32]:
    """onnx's own evaluator, whose numpy rounds the result of every operator to float16."""
    feed = {"x": VALUES} if choice is None else {"x": VALUES, "c": np.asarray(choice)}
    found: NDArray[np.float32] = ReferenceEvaluator(model).run(None, feed)[0]
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_is_inside_is_stored_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Add, Mul, Div and Sqrt of halves in float32, rounded once, are IEEE's of halves.

    (Figueroa 1995: p' >= 2 p + 2 bits make the second rounding harmless; 24 >= 2 * 11 + 2.)
    """
    model = parsed(CASES[case])
    path = saved(model, tmp_path)
    assert stores_float16(path)
    shows = []
    for choice in choices(model):
        expected = in_float16(model, choice)
        np.testing.assert_array_equal(as_stored(path, choice), expected)
        shows.append(not np.array_equal(expected, wide(model, choice), equal_nan=True))
    # The values are such that storing shows: ONNX Runtime alone gives something else.
    assert any(shows)


def wide(model: ModelProto, choice: bool | None) -> NDArray[np.float32]:
    extra = {} if choice is None else {"c": np.asarray(choice)}
    return OnnxSession(model.SerializeToString()).run(VALUES, extra)[0]


def in_halves(
    step: Callable[[NDArray[np.float16]], NDArray[np.float16]], values: NDArray[np.float32] = VALUES
) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return step(values.astype(np.float16)).astype(np.float32)


def square(half: NDArray[np.float16]) -> NDArray[np.float16]:
    return half * half


# What onnx's evaluator does not take: defaults of attributes, overloads, optionals.
BY_HAND = {
    "a type by default": (
        """
        g (float[N] x) => (float[N] y) { y = l.F(x) }
        <domain: "l", opset_import: ["" : 21]>
        F <kind: int = 10> (v) => (w) { a = Cast<to: int = @kind>(v) b = Mul(a, a)
                                        w = CastLike(b, v) }
        """,
        lambda: in_halves(square),
    ),
    "a type by default, in a branch": (
        """
        g (float[N] x) => (float[N] y) { y = l.F(x) }
        <domain: "l", opset_import: ["" : 21]>
        F <kind: int = 10> (v) => (w) {
            c = Constant<value: tensor = bool[1] {1}>()
            w = If(c) <then_branch = t () => (o) { a = Cast<to: int = @kind>(v) b = Mul(a, a)
                                                   o = CastLike(b, v) },
                       else_branch = e () => (p) { p = Neg(v) }>
        }
        """,
        lambda: in_halves(square),
    ),
    "overloads": (
        """
        g (float[N] x) => (float[N] y) { z = l.F:wide(x) y = l.F:half(z) }
        <domain: "l", overload: "wide", opset_import: ["" : 21]>
        F (v) => (w) { w = Mul(v, v) }
        <domain: "l", overload: "half", opset_import: ["" : 21]>
        F (v) => (w) { a = Cast<to=10>(v) b = Mul(a, a) w = Cast<to=1>(b) }
        """,
        lambda: in_halves(square, VALUES * VALUES),
    ),
    "an optional": (
        """
        g (float[N] x) => (float[N] y) {
            h = Cast<to=10>(x)
            o = Optional(h)
            a = OptionalGetElement(o)
            q = Mul(a, a)
            z = Div(q, a)
            y = Cast<to=1>(z)
        }
        """,
        lambda: in_halves(lambda half: half * half / half),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_what_onnx_does_not_evaluate_is_numpys_float16(case: str, tmp_path: Path) -> None:
    text, expected = BY_HAND[case]
    model = parsed(text)
    path = saved(model, tmp_path)
    assert stores_float16(path)
    np.testing.assert_array_equal(as_stored(path), expected())
    assert not np.array_equal(wide(model, None), expected(), equal_nan=True)


# --- what cannot be run as stored is refused, and float16 is seen in it all the same

BRANCH = """
g (float[N] x) => (float[N] y) {{
    h = Cast<to=10>(x)
    c = Constant<value: tensor = bool[1] {{1}}>()
    z = If(c) <then_branch = t () => (float16[N] o) {inside},
               else_branch = e () => (float16[N] p) {{ p = Neg(h) }}>
    y = Cast<to=1>(z)
}}
"""

REFUSED = {
    "the type of a tensor in a branch is unknown": (
        BRANCH.format(inside="{ q = com.microsoft.QuickGelu(h) o = Mul(q, q) }"),
        r"the type of \w+ is unknown",
    ),
    "a branch with a wrong type": (
        BRANCH.format(inside="<float[N] q> { q = Mul(h, h) o = Div(q, h) }"),
        "q is declared float, but its operator gives float16",
    ),
    "a wrong type": (
        "g (float[N] x) => (float[N] y) <float[N] q> "
        "{ h = Cast<to=10>(x) q = Mul(h, h) y = Cast<to=1>(q) }",
        "q is declared float, but its operator gives float16",
    ),
    "an output of a wrong type": (
        "g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) y = Mul(h, h) }",
        "y is declared float, but its operator gives float16",
    ),
    "operands of two types": (
        "g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) q = Mul(h, x) y = Cast<to=1>(q) }",
        "inconsistent type",
    ),
    "float16 inside an operator": (
        BRANCH.format(
            inside="{ k = CastLike(one, h) o = LayerNormalization<stash_type=10>(h, k) }"
        ).replace("(float[N] y) {", "(float[N] y) <float[1] one = {1.0}> {"),
        r"computes in float16 inside \(stash_type\)",
    ),
    "an unknown operator with a graph inside": (
        """
        g (float[N] x) => (float[N] y) <float16[N] z> {
            h = Cast<to=10>(x)
            z = com.microsoft.Repeat(h) <body = b (float16[N] v) => (float16[N] w) { w = Neg(v) }>
            y = Cast<to=1>(z)
        }
        """,
        "Repeat contains a graph",
    ),
    "a function that calls itself": (
        """
        g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) z = l.F(h) y = Cast<to=1>(z) }
        <domain: "l", opset_import: ["" : 21, "l" : 1]> F (v) => (w) { w = l.F(v) }
        """,
        "recursive",
    ),
    "a function of another opset": (
        """
        g (float[N] x) => (float y) { h = Cast<to=10>(x) z = l.F(h) y = Cast<to=1>(z) }
        <domain: "l", opset_import: ["" : 17]> F (v) => (w) { w = ReduceMin<keepdims = 0>(v) }
        """,
        "cannot be inlined",
    ),
    "a default behind an attribute that the caller leaves out": (
        """
        g (float[N] x) => (float[N] y) { y = l.F(x) }
        <domain: "l", opset_import: ["" : 21]>
        G <kind: int = 10> (v) => (w) { a = Cast<to: int = @kind>(v) w = CastLike(a, v) }
        <domain: "l", opset_import: ["" : 21, "l" : 1]>
        F <k> (v) => (w) { w = l.G<kind: int = @k>(v) }
        """,
        "leaves out k",
    ),
}


# Calls that cannot even be replaced by the nodes of what they call.
UNREADABLE = (
    "a function that calls itself",
    "a default behind an attribute that the caller leaves out",
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_and_says_why(case: str, tmp_path: Path) -> None:
    text, said = REFUSED[case]
    path = saved(parsed(text), tmp_path)
    with pytest.raises(GraphError, match=said):
        stored_session(path)
    # It is not taken for a graph without float16 and run in float32.
    if case in UNREADABLE:
        with pytest.raises(GraphError, match=said):
            stores_float16(path)
    else:
        assert stores_float16(path)


def test_an_operator_of_onnx_runtime_is_stored_where_its_type_is_declared(tmp_path: Path) -> None:
    inside = "<float16[N] q> { q = com.microsoft.QuickGelu(h) s = Mul(q, q) o = Div(s, q) }"
    found = as_stored(saved(parsed(BRANCH.format(inside=inside)), tmp_path))
    # 700.3 squared is beyond 65504; QuickGelu leaves it as it is.
    assert np.isinf(found[4])


# --- float16 that nothing at the top of a graph shows


@pytest.mark.parametrize(
    "inside",
    [
        "{ h = Cast<to=10>(x) o = Cast<to=1>(h) }",
        "{ k = Constant<value: tensor = float16[1] {1}>() w = Cast<to=1>(k) o = Mul(x, w) }",
        "{ s = Shape(x) f = ConstantOfShape<value: tensor = float16[1] {1}>(s) "
        "w = Cast<to=1>(f) o = Mul(x, w) }",
        "{ e = SequenceEmpty<dtype=10>() o = Neg(x) }",
        "{ r = RandomNormalLike<dtype=10>(x) w = Cast<to=1>(r) o = Mul(x, w) }",
    ],
)
def test_float16_is_seen_in_branches_and_functions(inside: str) -> None:
    ends = '<domain: "l", opset_import: ["" : 21]>'
    function = f"g (float[N] x) => (float[N] y) {{ y = l.F(x) }} {ends} F (x) => (o) {inside}"
    branch = f"""
        g (float[N] x, bool c) => (float[N] y) {{
            y = If(c) <then_branch = t () => (float[N] o) {inside},
                       else_branch = e () => (float[N] p) {{ p = Neg(x) }}> }}
        """
    for text in (function, branch):
        model = parsed(text)
        assert stores_float16(model)
        plain = text.replace("to=10", "to=11").replace("float16", "double")
        assert not stores_float16(parsed(plain.replace("dtype=10", "dtype=11")))


def test_float16_weights_of_a_branch_are_seen(tmp_path: Path) -> None:
    model = parsed(BRANCH.format(inside="{ o = Mul(h, k) }"))
    (then, _) = list(all_graphs(model.graph))[1:]
    then.initializer.append(numpy_helper.from_array(np.float16([3e-5]), "k"))
    path = saved(model, tmp_path)
    assert stores_float16(path)
    expected = in_halves(lambda half: half * np.float16(3e-5))
    np.testing.assert_array_equal(as_stored(path), expected)


def test_other_types_are_seen_too() -> None:
    text = BRANCH.format(inside="{ b = Cast<to=16>(h) o = Cast<to=10>(b) }")
    assert tensor_types(parsed(text)) == {"fp32", "fp16", "bf16", "bool"}
    quantised = "<float s = {1.0}, int8 z = {0}> { q = QuantizeLinear(x, s, z) "
    text = f"g (float[N] x) => (float[N] y) {quantised} y = DequantizeLinear(q, s, z) }}"
    assert "int8" in tensor_types(parsed(text))


def sparse(kind: type, flat_indices: bool) -> SparseTensorProto:
    values = numpy_helper.from_array(np.asarray([3e-5, 2.0], kind), "k")
    places = np.asarray([2, 7]) if flat_indices else np.asarray([[2], [7]])
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(places.astype(np.int64), "at"), [len(VALUES)]
    )


@pytest.mark.parametrize("where", ["initializer", "constant"])
@pytest.mark.parametrize("flat_indices", [True, False])
def test_sparse_constants(where: str, flat_indices: bool, tmp_path: Path) -> None:
    model = parsed(
        "g (float[N] x) => (float[N] y) { h = Cast<to=10>(x) a = Mul(h, k) y = Cast<to=1>(a) }"
    )
    made = sparse(np.float16, flat_indices)
    if where == "initializer":
        model.graph.sparse_initializer.append(made)
    else:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], sparse_value=made))
    path = saved(model, tmp_path)
    assert stores_float16(path)
    weights = np.zeros(len(VALUES), np.float16)
    weights[[2, 7]] = np.float16([3e-5, 2.0])
    np.testing.assert_array_equal(as_stored(path), in_halves(lambda half: half * weights))


def test_a_malformed_sparse_constant_is_refused(tmp_path: Path) -> None:
    model = parsed("g (float[N] x) => (float[N] y) { y = Mul(x, k) }")
    made = sparse(np.float16, flat_indices=True)
    made.indices.CopyFrom(numpy_helper.from_array(np.asarray([2, 700], np.int64), "at"))
    model.graph.sparse_initializer.append(made)
    with pytest.raises(GraphError, match="sparse constant"):
        load_graph(saved(model, tmp_path))


# --- products, files and the instruments of clipdeploy's own graphs


def test_products_of_functions_and_branches() -> None:
    model = parsed(
        """
        g (float16[2,2] x, bool c) => (float16[2,2] y) {
            a = l.F(x, w)
            y = If(c) <then_branch = t () => (float16[2,2] o) {
                           ["blocks.1/MatMul"] o = MatMul(a, x) },
                       else_branch = e () => (float16[2,2] p) { p = l.F(a, w) }>
        }
        <domain: "l", opset_import: ["" : 21]>
        F (v, k) => (r) { ["blocks.0/MatMul"] r = MatMul(v, k) }
        """
    )
    model.graph.initializer.append(numpy_helper.from_array(np.eye(2, dtype=np.float16), "w"))
    found = [(p.block, p.attention, p.precision) for p in find_products(model)]
    gemm, attention = ("blocks.0", False, "fp16"), ("blocks.1", True, "fp16")
    assert found == [gemm, attention, gemm]


def test_a_choice_by_a_constant_does_not_make_its_tensors_constants() -> None:
    model = parsed(
        """
        g (float[2,2] x) => (float[2,2] y) {
            c = Constant<value: tensor = bool[1] {1}>()
            a = If(c) <then_branch = t () => (float[2,2] o) { o = Neg(x) },
                       else_branch = e () => (float[2,2] p) { p = Abs(x) }>
            y = MatMul(a, a)
        }
        """
    )
    assert [p.attention for p in find_products(model)] == [True]


def test_functions_survive_a_file(tmp_path: Path) -> None:
    model = parsed(CASES["a branch in a function"])
    path = saved(model, tmp_path)
    write_model(load_graph(path), tmp_path / "again.onnx")
    for choice in (True, False):
        np.testing.assert_array_equal(
            wide(onnx.load(tmp_path / "again.onnx"), choice), wide(model, choice)
        )


def test_weight_files_of_branches_and_functions_are_named(tmp_path: Path) -> None:
    model = parsed(
        BRANCH.format(inside="{ o = Mul(h, k) }")
        + """
        <domain: "l", opset_import: ["" : 21]>
        F (v) => (w) { w = Neg(v) }
    """
    )
    outside = []
    for name in ("branch", "function"):
        weight = numpy_helper.from_array(np.float16([3e-5]), "k")
        (tmp_path / f"{name}.data").write_bytes(weight.raw_data)
        set_external_data(weight, f"{name}.data")
        weight.ClearField("raw_data")
        outside.append(weight)
    list(all_graphs(model.graph))[1].initializer.append(outside[0])
    constant = helper.make_node("Constant", [], ["k"], value=outside[1])
    model.functions[0].node.append(constant)
    path = saved(model, tmp_path)
    assert [file.name for file in weight_files(path)] == ["branch.data", "function.data"]
    expected = in_halves(lambda half: half * np.float16(3e-5))
    np.testing.assert_array_equal(as_stored(path), expected)


def test_clipdeploys_own_instruments_refuse_what_they_cannot_see(tmp_path: Path) -> None:
    branch = saved(parsed(BRANCH.format(inside="{ o = Mul(h, h) }")), tmp_path)
    reference = np.zeros(len(VALUES), np.float32)
    with pytest.raises(GraphError, match="does not support graphs inside If"):
        largest_values(branch, VALUES)
    with pytest.raises(GraphError, match="does not support graphs inside If"):
        check_storage(branch, VALUES, reference)
    with pytest.raises(GraphError, match="does not support graphs inside If"):
        ToFloat16()(load_graph(branch))


def test_the_instruments_look_into_functions(tmp_path: Path) -> None:
    text = """
        g (float[N] x) => (float[N] y) {{ h = Cast<to={kind}>(x) z = l.F(h) y = Cast<to=1>(z) }}
        <domain: "l", opset_import: ["" : 21]>
        F (v) => (w) {{ hot = Mul(v, v) w = Div(hot, v) }}
        """
    values = np.float32([1, 300])
    _, peaks = largest_values(saved(parsed(text.format(kind=1)), tmp_path), values)
    assert max(peaks.values()) == 90000
    half = saved(parsed(text.format(kind=10)), tmp_path)
    with pytest.raises(GraphError, match=r"hot\S* overflows"):
        check_storage(half, values, values)
    with pytest.raises(GraphError, match="does not support graphs inside F"):
        ToFloat16()(load_graph(half))
