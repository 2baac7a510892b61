"""The pages of the documentation: links lead somewhere, commands exist, and code runs as it is typed."""

from __future__ import annotations

import re
import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_leaves

from reimplementation import cli, ops
from reimplementation.bench.inputs import attention_inputs
from reimplementation.integrations import clients
from reimplementation.integrations.replacement import Accelerated
from reimplementation.models.deformable import SparseBox3DKeyPointsGenerator
from tests.integrations.test_acceleration import MSDeformAttn
from tests.markdown import PAGES, README, ROOT, anchors, code_blocks, commands, links

DOCS = ROOT / "docs"
MIGRATION = DOCS / "migration.md"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_the_index_lists_every_page():
    listed = {(DOCS / link).resolve() for link in links(DOCS / "index.md")}
    kernels = {(DOCS / "kernels" / link).resolve() for link in links(DOCS / "kernels" / "index.md")}
    pages = set(DOCS.rglob("*.md")) - {DOCS / "index.md"}
    assert pages <= listed | kernels, pages - listed - kernels


@every_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    named = set(re.findall(r"`(?:[A-Z]+=\S+ )*make ([a-z-]+)", text))
    named |= {command[1] for command in commands(page) if command[0] == "make"}
    assert named <= targets, named - targets


@every_page
def test_commands_exist(page, capsys):
    for command in commands(page):
        if command[:3] != ["python", "-m", "reimplementation"] or len(command) == 3:
            continue
        # argparse judges the values that come before --help, and forgives options that it does not know.
        with pytest.raises(SystemExit) as exited:
            cli.main([*command[3:], "--help"])
        output = capsys.readouterr().out
        assert exited.value.code == 0, command
        for option in command[3:]:
            assert not option.startswith("--") or option in output, f"{command}: there is no {option}"


@every_page
def test_extras_exist(page):
    extras = re.findall(r"^(\w+) = \[$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for named in re.findall(r"'(?:\.|reimplementation)\[([\w,]+)\]'", page.read_text()):
        assert set(named.split(",")) <= set(extras), named


@pytest.mark.parametrize("code", code_blocks(DOCS / "use.md", "python"), ids=lambda code: code.splitlines()[1][:60])
def test_use(code, capsys):
    torch.manual_seed(0)
    run(code)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_export(tmp_path, monkeypatch):
    """Every block of the page one after the other, and then the files that they leave behind."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    if (extension := ops.build_info()["file"]) is None:
        pytest.skip("the extension is not built")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(code_blocks(DOCS / "export.md", "python")).replace("/path/to/_C.abi3.so", extension)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = run(code)
    with torch.no_grad():
        expected = names["aggregate"](**names["inputs"])
        torch.testing.assert_close(names["model"](**names["inputs"]), expected)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    arguments = zip((argument.name for argument in session.get_inputs()), tree_leaves(names["inputs"]))
    (from_file,) = session.run(None, {name: tensor.numpy() for name, tensor in arguments})
    torch.testing.assert_close(torch.from_numpy(from_file), expected, rtol=1e-4, atol=1e-4)


class TestMigration:
    """The recipes, with stand-ins for what they import from the other projects."""

    def blocks(self, phrase: str) -> str:
        (found,) = [code for code in code_blocks(MIGRATION, "python") if phrase in code]
        return found

    def registry(self, registered: dict):
        """Like one of mmcv 1: it registers a class under its name, or another."""

        def register_module(name=None):
            return lambda cls: registered.setdefault(name or cls.__name__, cls)

        return types.SimpleNamespace(register_module=register_module)

    def test_the_planner_of_sparsedrive_reads_a_level_back(self):
        (code,) = [code for code in code_blocks(MIGRATION, "python") if "feature_maps_format" in code]
        names = run(code)
        levels = [torch.randn(2, 6, 8, 4, 11), torch.randn(2, 6, 8, 2, 5)]
        maps = names["feature_maps_format"](levels)
        assert torch.equal(names["feature_maps_format"](maps, inverse=True)[0][-1][:, 0], levels[-1][:, 0])

    def test_a_point_just_outside_counts_in_the_plain_path_alone(self):
        level, point, weights = torch.ones(1, 1, 4, 8, 8), torch.tensor([[-0.01, 0.5]]), torch.ones(1, 1, 1, 1, 1, 1)
        maps = ops.feature_maps_format([level])
        assert not ops.deformable_aggregation_function(*maps, point.view(1, 1, 1, 1, 2), weights).any()
        plain = torch.nn.functional.grid_sample(level[0], point.view(1, 1, 1, 2) * 2 - 1, align_corners=False)
        torch.testing.assert_close(plain, torch.full_like(plain, 0.42))  # 8 pixels wide: at pixel -0.58

    def test_cached_anchors_of_sparse4d(self, monkeypatch):
        registered = {}
        provide(monkeypatch, "mmcv.cnn.bricks.registry", PLUGIN_LAYERS=self.registry(registered))
        run(self.blocks("Sparse4DBox3DKeyPointsGenerator"))
        swapping = registered["SparseBox3DKeyPointsGenerator"]
        anchor, moves = torch.randn(2, 5, 11), [torch.eye(4).expand(2, 4, 4)]
        (ours,) = SparseBox3DKeyPointsGenerator.anchor_projection(anchor, moves, time_intervals=[0.5])
        (theirs,) = swapping.anchor_projection(anchor, moves, time_intervals=[0.5])
        assert torch.equal(theirs[..., [7, 6]], ours[..., [6, 7]])
        assert torch.equal(theirs[..., :6], ours[..., :6]) and torch.equal(theirs[..., 8:], ours[..., 8:])
        assert swapping().state_dict().keys() == SparseBox3DKeyPointsGenerator().state_dict().keys()

    def test_one_call(self):
        model = torch.nn.Sequential(MSDeformAttn())
        run(self.blocks("accelerate(model)"), model=model)
        assert isinstance(model[0], Accelerated)

    def test_the_name_of_deformable_detr(self):
        (code,) = [code for code in code_blocks(MIGRATION, "python") if code.count("\n") == 1 and "Function" in code]
        assert run(code)["MSDeformAttnFunction"] is ops.MSDeformAttnFunction

    def test_mmcv_looks_its_function_up(self, monkeypatch):
        module = provide(monkeypatch, "mmcv.ops.multi_scale_deform_attn", MultiScaleDeformableAttnFunction=None)
        run(self.blocks("import mmcv.ops"))
        assert module.MultiScaleDeformableAttnFunction is ops.MSDeformAttnFunction


class TestIntegrations:
    def test_one_call(self, capsys):
        (code, *_) = code_blocks(DOCS / "integrations.md", "python")
        model = torch.nn.Sequential(MSDeformAttn())
        report = run(code, model=model)["report"]
        assert "same results as before" in capsys.readouterr().out and isinstance(model[0], Accelerated)
        report.undo()

    def test_the_door_for_kernels(self, monkeypatch):
        """The package is tested in tests/integrations/test_packages.py, where it is installed."""
        (_, code, _) = code_blocks(DOCS / "integrations.md", "python")
        asked = []
        provide(
            monkeypatch,
            "kernels",
            Mode=types.SimpleNamespace(TRAINING="training"),
            use_kernel_mapping=lambda mapping: nullcontext(asked.append(mapping)),
            kernelize=lambda model, mode: asked.append((model, mode)),
        )
        run(code, model="a model")
        mapping, call = asked
        assert set(mapping["MultiScaleDeformableAttention"]) == {"cuda", "cpu"} and call == ("a model", "training")

    def test_the_slot_of_libreyolo(self, monkeypatch):
        """The package is tested there, too."""
        (*_, code) = code_blocks(DOCS / "integrations.md", "python")
        slot = ["theirs"]
        provide(
            monkeypatch,
            "libreyolo.kernels",
            resolve=lambda name: slot[-1],
            register=lambda op, attend, *, name: slot.append((op, attend)),
            unregister=lambda name, whose: slot.__setitem__(slice(1, None), []),
        )
        names = run(code)
        ((name, attend),) = slot[1:]
        assert name == "ms_deform_attn"
        inputs = attention_inputs("small-decoder")
        given = inputs.value, inputs.spatial_shapes, inputs.sampling_locations, inputs.attention_weights
        assert torch.equal(attend(*given), ops.ms_deform_attn(*inputs))
        names["empty_slot"]()
        assert slot == ["theirs"]

    def test_every_package_is_named(self):
        text = (DOCS / "integrations.md").read_text()
        for client in clients.PACKAGES:
            assert client.package in text
            for model in client.models.split(", "):
                assert model in text, model


def test_nothing_else_is_typed_in_python():
    """A page with new code needs a test of it."""
    typed = {page for page in PAGES if code_blocks(page, "python")}
    # tests/models/sparsedrive/test_docs.py and tests/models/backbones/test_vit_docs.py
    tested_elsewhere = {DOCS / "sparsedrive.md", DOCS / "vit.md"}
    assert (
        typed
        == {README, MIGRATION, *(DOCS / f"{name}.md" for name in ("use", "export", "integrations"))} | tested_elsewhere
    )


def run(code: str, **names) -> dict:
    """Run code as it is typed; returns the names that it leaves."""
    names["__name__"] = "typed"
    exec(compile(code, "<page>", "exec"), names)
    return names


def provide(monkeypatch, path: str, **contents) -> types.ModuleType:
    """Make a module importable that is not installed, with its packages."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    vars(module).update(contents)
    return module
