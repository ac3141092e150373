"""The command: checkpoints as they are really written, tables, what a broken-off run keeps, messages."""

import dataclasses
import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from click.testing import CliRunner
from flax import nnx, serialization
from flax.training.train_state import TrainState

import fantastic4 as f4
from fantastic4 import audit, checkpoints, network
from fantastic4 import nnx as f4nnx
from fantastic4.cli import main

RNG = np.random.default_rng(5)
CONV = RNG.standard_normal((3, 3, 2, 4)).astype(np.float32)
MATRIX = RNG.standard_normal((6, 5)).astype(np.float32)
PARAMS = {
    "Conv_0": {"kernel": CONV, "bias": np.ones(4, np.float32)},
    "Dense_0": {"kernel": MATRIX},
    "table": np.ones((7, 3), np.float32),
}
GRID = max(oracle.circular_values(CONV, (30, 30)))  # some of the frequencies: at most the norm at every size
NORMS = {"Conv_0/kernel": GRID, "Dense_0/kernel": np.linalg.norm(MATRIX.astype(float), 2)}


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["audit", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def rows(path):
    return {row["layer"]: row for row in map(json.loads, path.read_text().splitlines())}


def tasks_of(params, **options):
    return audit.tasks(params, network.find(params), **options)


def train_state():
    return TrainState.create(apply_fn=None, params=PARAMS, tx=optax.adam(1e-3))


def write_orbax(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, train_state())
    return path


def write_run(path):
    with ocp.CheckpointManager(path) as manager:
        early = {"params": {"Conv_0": {"kernel": np.zeros_like(CONV)}}}
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(early)))
        manager.save(12, args=ocp.args.Composite(state=ocp.args.StandardSave(train_state())))
        manager.wait_until_finished()
    return path


def write_msgpack(path):
    path = path.with_suffix(".msgpack")
    path.write_bytes(serialization.to_bytes(train_state()))
    return path


def write_npz(path):
    path = path.with_suffix(".npz")
    flat = {"Conv_0/kernel": CONV, "Conv_0/bias": np.ones(4), "Dense_0/kernel": MATRIX, "table": PARAMS["table"]}
    np.savez(path, **flat)
    return path


WRITERS = {"orbax": write_orbax, "run": write_run, "msgpack": write_msgpack, "npz": write_npz}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_others_write_is_read(kind, tmp_path):
    out = tmp_path / "audit.jsonl"
    printed = run(WRITERS[kind](tmp_path / "checkpoint"), "--out", out)
    found = rows(out)
    assert set(found) == set(NORMS), "the optimiser's moments are no layers"
    for name, norm in NORMS.items():
        assert found[name]["lower"] <= found[name]["upper"]
        assert norm <= found[name]["upper"] <= 1.002 * norm * (1.01 if name == "Conv_0/kernel" else 1)
        line = next(line for line in printed.splitlines() if name in line)
        least, most = map(float, re.findall(r" ([\d.]+) ", line)[-2:])
        assert found[name]["lower"] * (1 - 1e-4) < least <= found[name]["lower"]
        assert found[name]["upper"] <= most < found[name]["upper"] * (1 + 1e-4)
    assert found["Dense_0/kernel"]["lower"] <= NORMS["Dense_0/kernel"]
    assert "REFLECT and EDGE padding add to it: --specs" in printed
    assert re.search(r"Left out, no kernels by their names: table \(7×3\)", printed)
    assert (", params" in printed) == (kind != "npz"), "which part was read"


def test_an_nnx_state_of_a_model_beside_its_optimizer(tmp_path):
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "both", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
        checkpointer.save(tmp_path / "alone", nnx.state(model))
    for name, at in (("both", ("model",)), ("alone", ())):
        params = checkpoints.read(tmp_path / name)
        assert params.at == at
        np.testing.assert_array_equal(params.tree["kernel"], model.kernel[...])


def test_weights_of_pytorch(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {"features.0.weight": np.ascontiguousarray(CONV.transpose(3, 2, 0, 1)), "features.0.bias": np.ones(4)}
    safetensors.numpy.save_file(weights, path)
    out = tmp_path / "audit.jsonl"
    run(path, "--out", out)
    assert list(rows(out)) == ["features/0/weight"]
    assert rows(out)["features/0/weight"]["shape"] == [3, 3, 2, 4]
    [task] = tasks_of({"kernel": CONV})
    assert rows(out)["features/0/weight"]["upper"] == pytest.approx(task.run().upper, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_numbers_are_those_on_disk(dtype, tmp_path):
    """Float64 is not rounded to float32 on the way, and half precision is what it is."""
    value = np.full((1, 1, 1), 1 + 3e-8 if dtype == np.float64 else 0.1).astype(dtype)
    path = tmp_path / "one.safetensors"
    safetensors.numpy.save_file({"flax.kernel": value, "torch.weight": value}, path)
    for task in tasks_of(checkpoints.read(path).tree, rtol=1e-9):
        found = task.run()
        assert found.lower <= float(value.item()) <= found.upper


def test_a_run_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    path, out = write_npz(tmp_path / "checkpoint"), tmp_path / "audit.jsonl"
    real, calls = audit.Task.run, []

    def once(task):
        if calls:
            raise KeyboardInterrupt
        calls.append(task.name)
        return real(task)

    monkeypatch.setattr(audit.Task, "run", once)
    printed = run(path, "--out", out, code=130)
    assert calls == list(rows(out)) == ["Conv_0/kernel"]
    assert "Conv_0/kernel" in printed
    assert "Interrupted: 1 of 2 layers" in printed

    with out.open("a") as file:
        file.write('{"layer": "Dense_0/ker')  # killed while it wrote
    monkeypatch.setattr(audit.Task, "run", lambda task: calls.append(task.name) or real(task))
    run(path, "--out", out)
    assert calls == ["Conv_0/kernel", "Dense_0/kernel"]
    assert len(out.read_text().splitlines()) == 3
    run(path, "--out", out)
    assert len(calls) == 2
    run(path, "--out", out, "--rtol", "1e-2")  # another question
    assert len(calls) == 4
    np.savez(path, **{"Conv_0/kernel": CONV, "Dense_0/kernel": np.nextafter(MATRIX, 9)})  # other numbers
    run(path, "--out", out)
    assert calls[4:] == ["Dense_0/kernel"]


def test_what_is_kept_answers_the_same_question_only(tmp_path):
    (task, *_) = tasks_of(checkpoints.read(write_npz(tmp_path / "checkpoint")).tree)
    others = [
        {"kernel": task.kernel * 2}, {"kernel": task.kernel.astype(np.float16)}, {"kernel": task.kernel[::-1]},
        {"spec": f4.ConvSpec(strides=2)}, {"input_shape": (9, 9)}, {"rtol": task.rtol / 2},
    ]  # fmt: skip
    prints = {dataclasses.replace(task, **other).fingerprint for other in ({}, *others)}
    assert len(prints) == 1 + len(others)
    assert dataclasses.replace(task, name="another").fingerprint == task.fingerprint


def test_a_limit_decides_the_exit_status(tmp_path):
    path = write_npz(tmp_path / "checkpoint")
    norm = NORMS["Dense_0/kernel"]
    assert "Nothing is known of what was left out" in run(path, "--max-norm", 1e3, code=1)
    run(path, "--max-norm", 1e3, "--select", "*kernel")
    assert "Not proved to be at most" in run(path, "--max-norm", norm, "--select", "Dense_*", code=1)
    run(path, "--max-norm", 1.002 * norm, "--select", "Dense_*")
    np.savez(path, **{"a/kernel": np.array([[np.nan]]), "b/kernel": np.eye(2)})
    out = tmp_path / "audit.jsonl"
    assert "the kernel holds NaN" in run(path)
    for _ in range(2):  # as computed, and as kept
        assert "Not proved to be at most 1000: a/kernel" in run(path, "--max-norm", 1e3, "--out", out, code=1)
    assert rows(out)["a/kernel"]["upper"] is None


BESIDE = {
    "a head beside model": ({"model/a/kernel": MATRIX, "head/kernel": 9 * MATRIX}, "head/kernel", ""),
    "adapters": ({"params/a/kernel": MATRIX, "lora/a": MATRIX}, "Nothing is known of lora", "--at params"),
    "whole numbers": ({"a/kernel": MATRIX, "b/q": np.ones((3, 3), np.int8)}, "b/q (3×3)", "--select a/*"),
    "complex numbers": ({"a/kernel": MATRIX, "c/f": np.ones((3, 3), complex)}, "c/f (3×3)", "--select a/*"),
    "a matrix called scale": ({"a/kernel": MATRIX, "d/scale": np.ones((3, 3))}, "d/scale (3×3)", "--select a/*"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_is_passed_over_silently(name, tmp_path):
    """A gate does not pass for what was not looked at."""
    arrays, told, fix = BESIDE[name]
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    limit = 1.01 * np.linalg.norm(MATRIX, 2)
    assert told in run(path, "--max-norm", limit, code=1)
    if fix:
        run(path, "--max-norm", limit, *fix.split())
    np.savez(path, **{"model/kernel": MATRIX, "optimizer/mu/kernel": MATRIX, "step": 3, "rngs/key": np.ones((2, 2))})
    run(path, "--max-norm", limit)


def test_states_of_power_iterations_are_no_kernels(tmp_path):
    """Of this library's own; what is called so elsewhere is not passed over."""
    layer = f4nnx.SpectralBound(nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.state({"a": layer}))
        state = network.init(PARAMS, key=jax.random.key(0))
        checkpointer.save(tmp_path / "run", {"params": PARAMS, "bounds": state})
    assert "a/layer_instance/kernel" in run(tmp_path / "nnx", "--max-norm", 100)
    assert "bounds" not in run(tmp_path / "run", "--max-norm", 100, "--select", "*kernel")
    vectors = {"a/kernel": MATRIX, "b/state/vectors": MATRIX, "vectors": MATRIX}
    np.savez(tmp_path / "others.npz", **vectors)
    assert "b/state/vectors" in run(tmp_path / "others.npz", "--max-norm", 100, code=1)


def test_a_layer_of_which_nothing_comes_out_does_not_pass(tmp_path):
    np.savez(tmp_path / "a.npz", **{"stem/kernel": CONV})
    specs = tmp_path / "a.toml"
    specs.write_text('["stem/kernel"]\npadding = [[1, 1], [0, 1]]\ninput_shape = [1, 1]\n')
    assert "nothing comes out of it for an input of (1, 1)" in run(
        tmp_path / "a.npz", "--specs", specs, "--max-norm", 1, code=1
    )


def test_biases_of_several_axes_are_no_gap(tmp_path):
    np.savez(
        tmp_path / "a.npz", **{"q/kernel": np.ones((4, 2, 3)), "q/bias": np.ones((2, 3)), "e/kernel": np.ones((0, 3))}
    )
    run(tmp_path / "a.npz", "--max-norm", 10)


def test_transposed_weights_of_pytorch(tmp_path):
    """(inputs, outputs, …): read as Equinox keeps them, the norm would be another, and smaller."""
    weight = np.random.default_rng(0).standard_normal((1, 8, 3, 3)).astype(np.float32)
    safetensors.numpy.save_file({"up.weight": weight}, tmp_path / "up.safetensors")
    text = '["up/weight"]\ntransposed = true\nstrides = 3\npadding = "VALID"\n'
    for size in ("", "input_shape = [1, 1]\n"):
        (tmp_path / "up.toml").write_text(text + size)
        assert "write transpose_kernel = true" in run(
            tmp_path / "up.safetensors", "--specs", tmp_path / "up.toml", code=1
        )
        (tmp_path / "up.toml").write_text(text + size + "transpose_kernel = true\n")
        out = tmp_path / f"out{len(size)}"
        run(tmp_path / "up.safetensors", "--specs", tmp_path / "up.toml", "--out", out)
        found = rows(out)["up/weight"]  # of one pixel all of it is made, and nothing overlaps
        assert found["lower"] <= np.linalg.norm(weight.astype(float)) <= found["upper"] <= 1.002 * found["lower"]
        (tmp_path / "up.toml").write_text(text + size + "transpose_kernel = false\n")
        run(tmp_path / "up.safetensors", "--specs", tmp_path / "up.toml")


def test_names_are_printed_as_they_are(tmp_path):
    """Brackets are no markup."""
    path = tmp_path / "run[lr=1].npz"
    np.savez(path, **{"[conv]/kernel": MATRIX, "layer[/x]/kernel": MATRIX})
    printed = run(path, "--max-norm", 1, code=1)
    assert all(name in printed.replace("\n", "") for name in ("[lr=1]", "[conv]/kernel", "layer[/x]/kernel"))


def test_an_end_that_is_not_reached_is_marked(tmp_path):
    np.savez(tmp_path / "a.npz", kernel=CONV)
    (tmp_path / "specs.toml").write_text('[kernel]\npadding = "REFLECT"\n')
    printed = run(tmp_path / "a.npz", "--specs", tmp_path / "specs.toml")
    assert " *" in printed
    assert "* the two ends stay further apart than 0.001" in printed


def test_specs_say_what_the_layers_are(tmp_path):
    path, specs, out = tmp_path / "a.npz", tmp_path / "specs.toml", tmp_path / "audit.jsonl"
    heads, stack = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 3, 4))
    np.savez(path, **{"c/kernel": CONV.astype(float), "heads/kernel": heads, "stack/kernel": stack})
    specs.write_text(
        '["c/*"]\nstrides = 2\npadding = [[1, 1], [0, 1]]\ninput_shape = [6, 5]\n'
        '["heads/*"]\ndense = 2\n["stack/kernel"]\ndense = 1\nstacked = true\n'
    )
    run(path, "--specs", specs, "--out", out)
    layer = oracle.dense(CONV.astype(float), (6, 5), strides=2, padding=((1, 1), (0, 1)))
    truths = {"c/kernel": layer, "heads/kernel": heads.reshape(6, 4)}
    truths |= {f"stack/kernel[{i}]": stack[i] for i in range(2)}
    assert set(rows(out)) == set(truths)
    for name, matrix in truths.items():
        norm = np.linalg.norm(matrix, 2)
        row = rows(out)[name]
        assert row["lower"] <= norm * (1 + 1e-6)
        assert norm * (1 - 1e-6) <= row["upper"] <= 1.002 * norm
    assert rows(out)["c/kernel"]["spec"]["padding"] == [[1, 1], [0, 1]]
    assert rows(out)["c/kernel"]["input_shape"] == [6, 5]


def test_the_page_of_the_docs_shows_what_is_printed(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```py\n(.*?)```", page, re.DOTALL).group(1), {})
    shown = re.search(r"```\nfantastic4 audit model.npz\n\n(.*?)```", page, re.DOTALL).group(1)
    stripped = lambda text: [line.rstrip() for line in text.strip().splitlines()]
    assert stripped(run("model.npz")) == stripped(shown)


def test_the_page_of_the_docs_shows_specs_that_are_read(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()
    [specs] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "specs.toml").write_text(specs)
    kernels = {"stem/kernel": np.ones((7, 7, 3, 8)), "blocks/conv/kernel": np.ones((2, 3, 3, 4, 4))}
    kernels |= {"attention/heads/kernel": np.ones((2, 3, 5)), "up/kernel": np.ones((2, 2, 3, 3))}
    np.savez(tmp_path / "a.npz", **kernels)
    printed = run(tmp_path / "a.npz", "--specs", tmp_path / "specs.toml", "--rtol", "0.1")
    assert all(name in printed for name in ("stem/kernel", "blocks/conv/kernel[1]", "up/kernel"))


SPECS = {
    "other field": ("[a]\nstride = 2", "[a] has no stride: choose from"),
    "value": ("[a]\nstrides = 0", "[a]: strides must be ints of at least 1"),
    "path": ("[b]\nstrides = 2", "a spec for 'b', but no such path"),
    "input path": ("[b]\ninput_shape = [4]", "an input shape for 'b', but no such path"),
    "input shape": ('["*kernel"]\ninput_shape = "x"', "must be a tuple of ints"),
    "number of axes": ('["*kernel"]\ndense = "2"', "does not split a kernel"),
    "part of an axis": ('["*kernel"]\ndense = 1.5', "does not split a kernel"),
    "truth": ('["*kernel"]\ndense = true', "does not split a kernel"),
    "no truth": ('["*kernel"]\nstacked = "no"', "stacked is true or false, got 'no'"),
    "both": ("[a]\ndense = 1\nstrides = 2", "[a] is a matrix by dense, and has strides"),
    "no table": ("a = 2", 'a is no table: write ["a"]'),
    "syntax": ("[a", "specs.toml: "),
}


@pytest.mark.parametrize("case", SPECS)
def test_specs_that_are_wrong(case, tmp_path):
    text, message = SPECS[case]
    (tmp_path / "specs.toml").write_text(text)
    np.savez(tmp_path / "a.npz", kernel=CONV)
    assert message in run(tmp_path / "a.npz", "--specs", tmp_path / "specs.toml", code=1).replace("\n", " ")


def test_what_cannot_be_read_says_what_can(tmp_path):
    def refused(*arguments):
        printed = run(*arguments, code=1)
        assert printed.startswith("Error: ")
        assert "Traceback" not in printed
        return printed

    assert "no checkpoint at" in refused(tmp_path / "nothing")
    for name, fix in (("a.pth", "safetensors.torch.save_file"), ("a.h5", "numpy.savez"), ("a.txt", "known kind")):
        (tmp_path / name).write_bytes(b"x")
        assert fix in refused(tmp_path / name)
    for name in ("a.msgpack", "a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense" * 9)
        assert "a." in refused(tmp_path / name)
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", MATRIX)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    for name in ("empty.npz", "one.npz"):
        assert "no archive that numpy.savez wrote" in refused(tmp_path / name)
    good = write_npz(tmp_path / "good")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-40])
    assert "no archive that numpy.savez wrote" in refused(tmp_path / "cut.npz")
    assert "to write out.jsonl into" in refused(good, "--out", tmp_path / "missing" / "out.jsonl")
    assert "select 'Dens_0*' chooses nothing" in refused(good, "--select", "Conv*", "--select", "Dens_0*")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 9)
    run(good, "--out", tmp_path / "binary", "--select", "Dense*")
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]}}'
    (tmp_path / "f8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "float8: convert them" in refused(tmp_path / "f8.safetensors")
    torn = write_orbax(tmp_path / "torn")
    (torn / "_METADATA").write_text("{torn")
    assert "torn is no checkpoint that Orbax wrote" in refused(torn).replace("\n", " ")
    (tmp_path / "folder").mkdir()
    assert "_METADATA" in refused(tmp_path / "folder")
    np.savez(tmp_path / "b.npz", **{"opt_state/0/mu/kernel": MATRIX, "ema/kernel": MATRIX})
    assert "choose by --at" in refused(tmp_path / "b.npz")
    assert "no emma in this checkpoint: it has opt_state, ema" in refused(tmp_path / "b.npz", "--at", "emma")
    run(tmp_path / "b.npz", "--at", "ema")
    with ocp.CheckpointManager(tmp_path / "run") as manager:  # its tree stands in a folder called default
        manager.save(0, args=ocp.args.StandardSave({"ema_params": PARAMS}))
    assert "default, ema_params" in run(tmp_path / "run", "--at", "default/ema_params", "--select", "*kernel")
    assert (
        "is not in the range x>=0"
        in CliRunner().invoke(main, ["audit", str(tmp_path / "b.npz"), "--max-norm", "-1"]).output
    )
    np.savez(tmp_path / "d.npz", **{"a/b/opt_state/0/mu/kernel": MATRIX, "a/b/weights/kernel": MATRIX})
    assert "choose by --at" in refused(tmp_path / "d.npz")
    np.savez(tmp_path / "c.npz", **{"a/params/kernel": MATRIX, "b/params/kernel": MATRIX})
    assert "choose by --at one of a/params, b/params" in refused(tmp_path / "c.npz")
    assert "params/kernel: rtol must be a positive number" in refused(tmp_path / "c.npz", "--at", "a", "--rtol", "0")


def test_several_trees_in_one_step_are_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        both = {name: ocp.args.StandardSave({"kernel": MATRIX}) for name in ("generator", "critic")}
        manager.save(1, args=ocp.args.Composite(**both))
        manager.wait_until_finished()
    assert "several trees: name one of" in run(tmp_path / "run", code=1)
    run(tmp_path / "run" / "1" / "critic")


def test_a_product_that_vanishes_or_is_no_number():
    """Of 400 layers of norm 1/10 the product is 1e-400, which no float is: 0 would be below it."""
    rows = [network.Row(str(i), (1, 1), 0.1) for i in range(400)]
    assert 0 < network.Report(tuple(rows), "four").product < 1e-300
    assert network.Report((*rows[:3], network.Row("zero", (1, 1), 0.0)), "four").product == 0
    nan = network.Row("nan", (1, 1), math.nan)
    assert math.isnan(network.Report((network.Row("zero", (1, 1), 0.0), nan), "four").product)


def test_the_command_is_installed():
    [entry] = importlib.metadata.entry_points(group="console_scripts", name="fantastic4")
    assert entry.load() is main
    assert CliRunner().invoke(main, ["--version"]).output.startswith("fantastic4, version ")


def test_without_click_it_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; import fantastic4.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "the command needs click: pip install 'fantastic4[cli]'"


def test_a_tree_in_memory_is_as_good():
    [conv, matrix] = tasks_of({"c": {"kernel": CONV}, "d": {"kernel": MATRIX}}, input_shapes={"c/*": (4, 4)})
    assert (conv.input_shape, matrix.input_shape, matrix.shape) == ((4, 4), None, (6, 5))
    assert jax.numpy.isfinite(matrix.run().upper)
