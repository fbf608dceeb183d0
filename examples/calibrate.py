"""Measure what the layers of a model need, and give a cache the profile.

python -m examples.calibrate

On the command line: `hf-reasoncache calibrate MODEL --prompts FILE --out DIR`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, make_problems
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.calibration.prompts import Prompt, PromptSet
from hf_reasoncache.calibration.run import calibrate
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.settings import CalibrationSettings


def main() -> None:
    name = MODELS["llama"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")

    problems = make_problems("walk", 4, seed=1500, family="llama")
    prompts = tuple(Prompt(each.prompt, f"walk {n}") for n, each in enumerate(problems))

    with TemporaryDirectory() as folder:
        wave = Path(folder) / "wave"
        # Evict as the cache below will.
        eviction = Eviction(buffer=16, window=16)
        settings = CalibrationSettings(Sensitivity(budget=112, eviction=eviction))
        found = PromptSet("walk", None, prompts)
        profile = calibrate(model, tokenizer, found, wave, settings, say=print)
        demand = " ".join(f"{tokens:.0f}" for tokens in profile.demand)
        print(f"tokens that each layer needs: {demand}")

        cache = ReasonAllocCache(model.config, budget=112, buffer=16, window=16, profile=wave)
    inputs = tokenizer(problems[0].prompt, return_tensors="pt")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=512)
    print(cache.report())


if __name__ == "__main__":
    main()
