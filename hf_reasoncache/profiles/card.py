"""The model card of a profile: what it is, how to use it, what was measured."""

from __future__ import annotations

import json

from huggingface_hub import ModelCard, ModelCardData

from hf_reasoncache.profiles.hub import is_repo_id
from hf_reasoncache.profiles.plot import wave_png
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.profiles.summary import facts, layer_rows, title

CARD = "README.md"
PICTURE = "wave.png"
TAGS = ("hf-reasoncache", "budget-profile", "kv-cache", "reasoning")
_BUDGET = 1024  # of the table's last column


def card_files(profile: BudgetProfile, repo_id: str) -> dict[str, bytes]:
    """Return the model card and the picture that it shows, by file name.

    Parameters
    ----------
    profile : BudgetProfile
    repo_id : str
        The repository that the card is for.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    return {
        CARD: str(model_card(profile, repo_id)).encode(),
        PICTURE: wave_png({title(profile): profile}),
    }


def model_card(profile: BudgetProfile, repo_id: str) -> ModelCard:
    """Return the card, with metadata by which the Hub links model and data set.

    They are linked where their commit is known: another name may be that of a local directory.
    """
    run = profile.calibration
    on_hub = profile.base_model_revision is not None and is_repo_id(profile.base_model)
    data = ModelCardData(
        base_model=profile.base_model if on_hub else None,
        datasets=[run.data] if run.data_revision is not None and is_repo_id(run.data) else None,
        library_name="hf-reasoncache",
        tags=list(TAGS),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(profile, repo_id)}")


def _body(profile: BudgetProfile, repo_id: str) -> str:
    about = "\n".join(f"| {label} | {_cell(text)} |" for label, text in facts(profile).items())
    layers = "\n".join(
        f"| {row.layer} | {row.demand:.4g} | {row.standard_error:.2g} | {row.relative:.2f} | "
        f"{row.budget} |"
        for row in layer_rows(profile, _BUDGET)
    )
    return f"""# Budget profile of {_cell(profile.base_model)}

How much of a KV-cache budget each full-attention layer of this model needs, measured by
hf-reasoncache. It holds no weights.

```python
import hf_reasoncache
from hf_reasoncache import ReasonAllocCache
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    {json.dumps(profile.base_model)}, attn_implementation="reasoncache"
)
cache = ReasonAllocCache(model.config, budget={_BUDGET}, profile="{repo_id}")
out = model.generate(**inputs, past_key_values=cache)
```

![Demand of each layer, divided by the mean, with standard errors]({PICTURE})

| | |
|---|---|
{about}

Demand and its standard error over the prompts, demand divided by the mean, and tokens per KV head
when the layers have {_BUDGET} on average:

| layer | demand | standard error | of mean | budget of {_BUDGET} |
|---:|---:|---:|---:|---:|
{layers}

Only the ratios of the demand matter. Layer budgets are those of ReasonAlloc (arXiv 2606.11164):
demand to the power of the exponent, within the bounds, scaled to the mean budget.
"""


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return text.replace("|", "\\|")
