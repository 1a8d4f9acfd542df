"""Base policies in files: specs that lead nowhere, Python controllers, missing extras, ONNX and TorchScript."""

import sys
from pathlib import Path

import numpy as np
import pytest

from o2o.data.datasets import Dataset
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.policies.base import base_labels
from o2o.runs.session import load_base


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", "none that o2o knows"),
        ("no_such_module_here:act", "cannot be imported"),
        ("math:no_such_name", "no callable 'no_such_name'"),
        ("absent.onnx", "there is no such file"),
        ("absent.pt", "there is no such file"),
    ],
)
def test_bad_specs_refused(spec: str, words: str) -> None:
    """Specs that lead nowhere are refused with the reason."""
    with pytest.raises(ConfigError, match=words):
        load_base(spec)


def test_python_file_controller(world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller in a Python file is loaded as a base policy, by module name or by path."""
    code = "import numpy as np\ndef make():\n    return lambda observation: np.full(2, 0.25)\ndef act(observation):\n"
    (tmp_path / "my_controller.py").write_text(code + "    return np.full(2, 0.25)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for spec in ("my_controller:make", "my_controller:act", f"{tmp_path}/my_controller.py:act"):
        now, _ = base_labels(load_base(spec), world)
        np.testing.assert_allclose(world.action_map.to_env(now), 0.25, atol=1e-6)


@pytest.mark.parametrize(("name", "module", "extra"), [("p.onnx", "onnxruntime", "onnx"), ("p.pt", "torch", "torch")])
def test_missing_extra_named(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra is named with the command that installs it."""
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}, which is not installed: pip install 'o2o\[{extra}\]'"):
        load_base(tmp_path / name)


def linear(state: np.ndarray) -> np.ndarray:
    """Return what the exported policies compute."""
    return 0.1 * np.stack([state[..., 0] + 1.0, state[..., 1] - state[..., 2]], axis=-1)


WEIGHT, BIAS = np.asarray([[0.1, 0.0], [0.0, 0.1], [0.0, -0.1]], np.float32), np.asarray([0.1, 0.0], np.float32)


def write_onnx(path: Path, width: int = 3) -> None:
    onnx = pytest.importorskip("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["obs", "w"], ["wx"]), helper.make_node("Add", ["wx", "bias"], ["action"])],
        "policy",
        [helper.make_tensor_value_info("obs", number, ["batch", width])],
        [helper.make_tensor_value_info("action", number, ["batch", 2])],
        [onnx.numpy_helper.from_array(np.resize(WEIGHT, (width, 2)), "w"), onnx.numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_onnx_graph(world: Dataset, tmp_path: Path) -> None:
    """An ONNX graph is loaded as a base policy; one that does not fit or is broken is refused."""
    pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "policy.onnx")
    source = load_base(tmp_path / "policy.onnx")
    now, _ = base_labels(source, world)
    expected = linear(world.arrays["observations"])
    np.testing.assert_allclose(now, world.action_map.from_env(expected), atol=1e-5)
    assert source.fingerprint == load_base(str(tmp_path / "policy.onnx")).fingerprint
    write_onnx(tmp_path / "wide.onnx", 5)
    with pytest.raises(EnvironmentMismatchError, match=r"takes .*5.*; observations here are a\[1\] \+ b\[2\]"):
        base_labels(load_base(tmp_path / "wide.onnx"), world)
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        base_labels(load_base(tmp_path / "broken.onnx"), world)


def test_torchscript_module(world: Dataset, tmp_path: Path) -> None:
    """A TorchScript module or an exported program is loaded as a base policy; a broken one is refused."""
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(WEIGHT.T.copy()))
        layer.bias.copy_(torch.as_tensor(BIAS))
    torch.jit.script(layer).save(str(tmp_path / "policy.pt"))
    torch.export.save(torch.export.export(layer, (torch.zeros(1, 3),)), str(tmp_path / "policy.pt2"))
    for name in ("policy.pt", "policy.pt2"):
        now, _ = base_labels(load_base(tmp_path / name), world)
        np.testing.assert_allclose(now, world.action_map.from_env(linear(world.arrays["observations"])), atol=1e-5)
    (tmp_path / "broken.pt").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not of torch.jit.save"):
        base_labels(load_base(tmp_path / "broken.pt"), world)
