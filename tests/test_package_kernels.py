"""The kernels as a package of their own: what tools/package_kernels.py writes, loaded and used."""

import importlib.util
import inspect
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from videonsa import nsa_kernels, nsa_reference
from videonsa.nsa_kernels_primitives import HEAD_DIMS

import package_kernels
from numerics import Case, assert_as_accurate, packed
from paths import ROOT

CASE = Case((27, 21), 3, 1, block_size=8, num_selected=2, window_size=5, cached=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "gated-nsa"
    package_kernels.main([str(folder)])
    return folder


@pytest.fixture(scope="module")
def nsa(folder):
    """A build, imported as the `kernels` library does it: by path, as the module of its id."""
    build = folder / "build/torch-cpu"
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import gated_nsa

    return gated_nsa


def results(function, dtype=torch.float32, device="cpu"):
    """The output and the gradients of q, k, v and the gates."""
    *inputs, cu_q, cu_k = packed(CASE, dtype, device=device)
    inputs = [x.requires_grad_() for x in inputs]
    o = function(*inputs, cu_q, cu_k, **CASE.sizes)
    return [o, *torch.autograd.grad(o.square().sum(), inputs)]


def assert_kernels_are_as_accurate(function, device):
    found = [x.cpu() for x in results(function, device=device)]
    eager, exact = (
        results(nsa_reference.nsa_attention, dtype) for dtype in (torch.float32, torch.float64)
    )
    for name, *each in zip(("o", "dq", "dk", "dv", "dgates"), found, eager, exact, strict=True):
        assert_as_accurate(name, *each)


def test_it_has_all_functions_under_their_names(nsa):
    assert nsa.__all__ == sorted([*nsa_kernels.__all__, "gate_weights"])
    for name in nsa_kernels.__all__:
        here, there = getattr(nsa_reference, name), getattr(nsa, name)
        assert inspect.signature(here) == inspect.signature(there) and here.__doc__ == there.__doc__


def test_on_a_cpu_it_is_the_reference_to_the_bit(nsa):
    for found, wanted in zip(
        results(nsa.nsa_attention), results(nsa_reference.nsa_attention), strict=True
    ):
        assert torch.equal(found, wanted)
    lengths = {name: torch.tensor([0, 4]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    q, k, gates = torch.ones(4, 1, 16), torch.ones(4, 1, 16), torch.ones(4, 1, 3)
    sizes = {"block_size": 2, "num_selected": 1, "window_size": 1}
    named = nsa.nsa_attention(q=q, k=k, v=k, gates=gates, **lengths, **sizes)
    assert torch.equal(named, torch.tensor([2.0, 3, 3, 3])[:, None, None].expand(4, 1, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
def test_its_kernels_run_from_where_they_lie(nsa, quick_interpreter):
    pytest.importorskip("triton")
    assert_kernels_are_as_accurate(nsa.nsa_kernels.nsa_attention, "cpu")


@pytest.mark.gpu
def test_on_a_gpu_its_kernels_run(nsa, monkeypatch, example, capsys):
    assert_kernels_are_as_accurate(nsa.nsa_attention, "cuda")
    monkeypatch.setattr(nsa.nsa_reference, "nsa_attention", None)
    assert example.train(nsa, "cuda") > 0.9


def test_the_example_learns(nsa, example, capsys):
    assert example.train(nsa, "cpu") > 0.9
    assert "step 149: loss" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_kernels_library_loads_it(folder, backend):
    kernels = pytest.importorskip("kernels")
    from kernels._rust import Digest, DigestAlgorithm

    if not torch.version.cuda and backend == "cuda":
        pytest.skip("needs a torch that is built for CUDA")
    loaded = kernels.get_local_kernel(folder, backend=backend)
    assert torch.equal(results(loaded.nsa_attention)[0], results(nsa_reference.nsa_attention)[0])
    (one,) = (one for one in kernels.get_loaded_kernels() if one.module is loaded)
    assert (str(one.metadata.name), one.metadata.version) == ("gated-nsa", 1)
    build = folder / f"build/torch-{backend}"
    one.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))


def test_another_file_makes_another_module():
    first, second = (package_kernels.metadata("cpu", {"a.py": text})["id"] for text in (b"1", b"2"))
    assert first != second and first.isidentifier() and second.isidentifier()


def test_a_folder_that_exists_is_left_alone(folder, capsys):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit):
        package_kernels.main([str(folder)])
    assert "exists; name a new folder" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_the_card_has_the_tables_numbers(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\d.*\|$", card, re.MULTILINE)
    assert len(rows) == 4 and all(f"{row}\n" in page for row in rows)
    assert "28 query and 4 key/value heads of size 128, block 64, 32 selected" in page
    assert "one NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, Triton 3.6.0, bfloat16, one" in page
    assert (
        f"{', '.join(map(str, HEAD_DIMS[:3]))} and {HEAD_DIMS[3]}" in card and len(HEAD_DIMS) == 4
    )


def test_the_cards_code_runs(folder, nsa, monkeypatch):
    """On the CPU, with fewer tokens, and the package that is here for the Hub's."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace('"cuda"', '"cpu"').replace("3000", "30").replace("1000", "10")
    asked = []

    def get_kernel(*args, **kwargs):
        asked.append((args, kwargs))
        return nsa

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    names = {}
    exec(code, names)
    assert names["o"].shape == (30, 28, 128)
    assert asked[0][1]["version"] == package_kernels.VERSION
