"""Statistics of queries: against the projections themselves, in a profile, in the official file."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_reasoncache.calibration.queries import (
    MEAN,
    NORM,
    load_queries,
    measure_queries,
    query_statistics,
    read_official,
    write_official,
)
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.evaluation import parse_spec
from hf_reasoncache.evaluation.specs import control
from hf_reasoncache.geometry import Geometry, rotary_frequencies
from hf_reasoncache.scorers import Random, TriAttention
from tests.support.models import HEAD_SIZE, HEADS, LAYERS, SHAPE, VOCABULARY, build
from tests.support.profiles import make_profile

IDS = tuple(
    torch.randint(3, VOCABULARY, (50,), generator=torch.Generator().manual_seed(0)).tolist()
)
TRACE = Trace(IDS[:20], IDS[20:])


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def measured(model):
    return measure_queries(model, TRACE)


def test_measured_is_what_the_projection_gives(model, measured) -> None:
    """Before RoPE; the last token is not read, as nothing follows it."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, inputs, output, index=index: seen.__setitem__(index, output)
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([IDS[:-1]]))
    for hook in hooks:
        hook.remove()
    for index, output in seen.items():
        query = output[0].unflatten(-1, (-1, HEAD_SIZE)).double()
        torch.testing.assert_close(
            measured[MEAN][index].double(), query.mean(0), atol=1e-5, rtol=1e-4
        )
        size = torch.hypot(*query.chunk(2, -1)).mean(0)
        torch.testing.assert_close(measured[NORM][index].double(), size, atol=1e-5, rtol=1e-4)


def test_profiles_keep_them_prompt_by_prompt(model, measured) -> None:
    kept = {name: torch.stack([each, 3 * each]) for name, each in measured.items()}
    found = query_statistics(kept, model.config)
    assert found.layers == tuple(range(LAYERS))
    assert found.mean.shape == (LAYERS, HEADS, 3, HEAD_SIZE)
    torch.testing.assert_close(found.mean.flatten(1, 2), 2 * measured[MEAN])
    torch.testing.assert_close(found.norm.flatten(1, 2), 2 * measured[NORM])
    with pytest.raises(ValueError, match="calibrate with queries"):
        query_statistics({"divergence": kept[MEAN]}, model.config)
    with pytest.raises(ValueError, match=r"expected statistics \[3, 6, 16\]"):
        query_statistics({name: each[:, :2] for name, each in kept.items()}, model.config)


def test_the_official_file_goes_round(model, measured, tmp_path: Path) -> None:
    known = query_statistics({name: each[None] for name, each in measured.items()}, model.config)
    path = tmp_path / "stats.pt"
    write_official(path, known, model.config)
    content = torch.load(path, weights_only=True)
    assert content["metadata"]["sampled_heads"][-1] == [2, 5]
    assert content["metadata"]["rope_theta"] == 10000.0
    entry = content["stats"]["layer02_head05"]
    assert entry.keys() == {"q_mean_real", "q_mean_imag", "q_abs_mean"}
    torch.testing.assert_close(entry["q_mean_imag"], measured[MEAN][2, 5, HEAD_SIZE // 2 :])
    assert path.stat().st_size < 100_000, "no tensor is saved with what it is a part of"
    found = read_official(path, model.config)
    assert found.digest == known.digest


class Evil:
    """Would run when a pickle is trusted."""

    def __reduce__(self):
        return (pytest.fail, ("executed",))


def test_files_that_are_refused(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, half = tmp_path / "stats.pt", HEAD_SIZE // 2
    heads = [(layer, head) for layer in range(LAYERS) for head in range(6)]
    parts = ("q_mean_real", "q_mean_imag", "q_abs_mean")
    stats = {
        f"layer{layer:02d}_head{head:02d}": {name: torch.ones(half) for name in parts}
        for layer, head in heads
    }

    def refuses(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_official(path, model.config)

    refuses({"metadata": {}, "stats": {"layer00_head00": Evil()}}, "tensors, numbers and texts")
    refuses([1, 2], "expected 'metadata' and 'stats'")
    refuses({"metadata": {"rope_style": "interleaved"}, "stats": stats}, "rope_style 'half'")
    fewer = {name: each for name, each in stats.items() if name != "layer01_head04"}
    refuses({"metadata": {}, "stats": fewer}, "q_mean_real of layer 1, head 4, got None")
    wide = stats | {"layer00_head00": {name: torch.ones(half + 1) for name in parts}}
    refuses({"metadata": {}, "stats": wide}, r"expected 8 numbers .* got \[9\]")
    lost = stats | {"layer00_head00": {name: torch.full((half,), torch.nan) for name in parts}}
    refuses({"metadata": {}, "stats": lost}, "finite numbers")
    path.write_bytes(b"no file of torch")
    with pytest.raises(ValueError, match="that torch has saved"):
        read_official(path, model.config)
    buffer = io.BytesIO()
    torch.save({"metadata": {}, "stats": stats}, buffer)
    path.write_bytes(buffer.getvalue())
    read_official(path, model.config)
    monkeypatch.setattr("hf_reasoncache.calibration.queries.LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="at most 1,000 bytes"):
        read_official(path, model.config)


KINDS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_the_model(kind: str) -> None:
    config = LlamaConfig(**SHAPE, head_dim=HEAD_SIZE, rope_parameters=KINDS[kind])
    embedding = LlamaForCausalLM(config).model.rotary_emb
    found = torch.tensor(rotary_frequencies(config))
    torch.testing.assert_close(found, embedding.inv_freq, atol=1e-7, rtol=1e-5)
    if kind == "llama3":
        plain = 500.0 ** (-torch.arange(8) / 8)
        ratio = plain / found
        assert float(ratio.max()) > 7.9 and float(ratio.min()) < 1.01 and len(ratio.unique()) > 2


def test_other_rotations_are_refused_by_name(model) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(ValueError, match=r"llama: expected default, linear or llama3 .* 'yarn'"):
        rotary_frequencies(LlamaConfig(**SHAPE, head_dim=HEAD_SIZE, rope_parameters=yarn))
    with pytest.raises(ValueError, match=r"deepseek_v3: expected .* multi-head latent attention"):
        rotary_frequencies(build("deepseek_v3").config)
    torch.manual_seed(0)
    pairs = CohereForCausalLM(CohereConfig(**SHAPE, attn_implementation="reasoncache"))
    with pytest.raises(ValueError, match=r"turns the halves of a query .* CohereForCausalLM"):
        measure_queries(pairs.eval(), TRACE)
    with pytest.raises(ValueError, match=r"one rotary embedding for all layers, got Gemma3"):
        measure_queries(build("gemma3"), TRACE)


def test_a_run_names_where_they_are(model, measured, tmp_path: Path) -> None:
    path = tmp_path / "stats.pt"
    known = query_statistics({name: each[None] for name, each in measured.items()}, model.config)
    write_official(path, known, model.config)
    spec = parse_spec(f"tri-attention:queries={path},prompt=evict")
    scorer = spec.make(model.config, 40, None, 0).own_layers[0].policy.scorer
    assert isinstance(scorer, TriAttention) and scorer.statistics.digest == known.digest
    assert control(spec).name == "random:prompt=evict"
    assert control(spec).make(model.config, 40, None, 0).own_layers[0].policy.scorer == Random()
    geometry = {"geometry": Geometry.of(model.config), "demand": (1.0,) * LAYERS}
    profile = make_profile(
        **geometry, standard_error=(0.0,) * LAYERS, head_demand=None, statistics={}
    )
    prompts = len(profile.calibration.prompts)
    kept = {name: torch.stack([each] * prompts) for name, each in measured.items()}
    replace(profile, statistics=kept).save_pretrained(tmp_path / "wave")
    assert load_queries(str(tmp_path / "wave"), model.config).digest == known.digest
    for text in ("tri-attention", "tri-attention:scorer=rkv", f"rkv:queries={path}"):
        with pytest.raises(ValueError, match="--cache"):
            parse_spec(text)
