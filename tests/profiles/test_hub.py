"""Push and pull with the real client, against a server on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_reasoncache import BudgetProfile, ReasonAllocCache
from hf_reasoncache.profiles import files
from hf_reasoncache.profiles.hub import Repository
from tests.support.hub_server import Hub, connected_hub
from tests.support.models import build
from tests.support.profiles import make_profile

REPO = "org/wave"
PROFILE = make_profile()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with connected_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def same(found: BudgetProfile, expected: BudgetProfile) -> bool:
    return found.to_files() == expected.to_files()


def no_profile_in(cache: Path) -> bool:
    """Whether no snapshot in the Hub's cache has a file that could be taken for a profile's."""
    return not [path for path in cache.rglob("snapshots/*/*") if path.exists()]


def test_push_then_pull(hub: Hub) -> None:
    address = PROFILE.push_to_hub(REPO)
    sha, stored = hub.repos[REPO][-1]
    assert address == f"{hub.url}/{REPO}/commit/{sha}"
    # All in one commit, after the empty one of the new repository.
    assert len(hub.repos[REPO]) == 2
    assert set(stored) == {"config.json", "statistics.safetensors", "README.md", "wave.png"}
    found = BudgetProfile.from_pretrained(REPO)
    assert same(found, PROFILE) and found == PROFILE


def test_the_card(hub: Hub) -> None:
    PROFILE.push_to_hub(REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.base_model == "org/model"
    assert card.data.datasets == ["org/prompts"]
    assert {"hf-reasoncache", "budget-profile"} <= set(card.data.tags)
    assert f'profile="{REPO}"' in card.text and "(wave.png)" in card.text
    # 90 / ((1/3 + 90 + 40) / 3) = 2.0716
    assert f"| 1 | 90 | 2.5 | 2.07 | {PROFILE.layer_budgets(1024)[1]} |" in card.text
    assert hub.files(REPO)["wave.png"].startswith(b"\x89PNG")
    # A directory's name would be taken for a model of the Hub.
    make_profile(base_model="models/mine", base_model_revision=None).push_to_hub(REPO)
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.base_model is None


def test_pull_by_revision(hub: Hub) -> None:
    first = hub.commit(REPO, PROFILE.to_files())
    newer = make_profile(demand=(3, 2, 1), statistics={"x": torch.ones(2, 3)})
    hub.commit(REPO, newer.to_files())
    assert same(BudgetProfile.from_pretrained(REPO, revision=first), PROFILE)
    assert same(BudgetProfile.from_pretrained(REPO), newer)
    with pytest.raises(RevisionNotFoundError):
        BudgetProfile.from_pretrained(REPO, revision="no-such-branch")


def test_both_files_are_of_one_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(REPO, PROFILE.to_files())
    newer = make_profile(statistics={"x": torch.ones(2, 3)}).to_files()

    def push_in_between(method: str, path: str) -> None:
        if path.endswith("statistics.safetensors") and len(hub.repos[REPO]) == 1:
            hub.commit(REPO, newer)

    hub.fault = push_in_between
    assert same(BudgetProfile.from_pretrained(REPO), PROFILE)


def test_a_push_without_statistics_removes_older_ones(hub: Hub) -> None:
    PROFILE.push_to_hub(REPO)
    hub.files(REPO)["notes.md"] = b"stays"
    lean = make_profile(statistics={})
    lean.push_to_hub(REPO)
    assert set(hub.files(REPO)) == {"config.json", "README.md", "wave.png", "notes.md"}
    assert same(BudgetProfile.from_pretrained(REPO), lean)


def test_a_models_repository_is_left_alone(hub: Hub) -> None:
    hub.commit(REPO, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"})
    with pytest.raises(ValueError, match=r"org/wave/config\.json: .* perhaps a model's config"):
        PROFILE.push_to_hub(REPO)
    assert len(hub.repos[REPO]) == 1


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(Repository(REPO, token="secret"))


def test_a_cache_takes_the_repository_and_leaves_the_statistics(hub: Hub) -> None:
    hub.commit(REPO, PROFILE.to_files())
    hub.requests.clear()
    cache = ReasonAllocCache(build("llama").config, budget=64, profile=REPO)
    assert cache.layers[0].policy.demand == PROFILE.demand
    assert cache.layers[0].policy.rule == PROFILE.rule
    assert not [request for request in hub.requests if "statistics" in request]


@pytest.mark.parametrize("how", ["argument", "environment", "no server"])
def test_offline_from_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub.commit(REPO, PROFILE.to_files())
    BudgetProfile.from_pretrained(REPO)
    hub.requests.clear()
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
    elif how == "no server":
        hub.shutdown()
        hub.socket.close()
        close_session()
    local = how == "argument"
    assert same(BudgetProfile.from_pretrained(REPO, local_files_only=local), PROFILE)
    assert hub.requests == []
    with pytest.raises(LocalEntryNotFoundError):
        BudgetProfile.from_pretrained("org/never-seen", local_files_only=local)


def test_missing_repository(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError, match="org/wave"):
        BudgetProfile.from_pretrained(REPO)
    assert no_profile_in(tmp_path)


def test_repository_that_is_no_profile(hub: Hub) -> None:
    hub.commit(REPO, {"model.safetensors": b"weights"})
    with pytest.raises(OSError, match=r"config\.json"):
        BudgetProfile.from_pretrained(REPO)
    hub.commit(REPO, {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ValueError, match=r"org/wave.* format_version, got none.*model's"):
        BudgetProfile.from_pretrained(REPO)


def test_unauthorised(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PROFILE.push_to_hub(REPO, private=True)
    assert same(BudgetProfile.from_pretrained(REPO), PROFILE)
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(HfHubHTTPError, match=r"401|Repository Not Found"):
        BudgetProfile.from_pretrained(REPO, token="hf_wrong", cache_dir=elsewhere)
    assert no_profile_in(elsewhere)
    commits = len(hub.repos[REPO])
    with pytest.raises(HfHubHTTPError, match="401"):
        PROFILE.push_to_hub(REPO, token="hf_wrong")
    assert len(hub.repos[REPO]) == commits


@pytest.mark.parametrize("name", PROFILE.to_files())
def test_truncated_download(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.commit(REPO, PROFILE.to_files())
    # Half of what is left, each time the client resumes; then nothing works any more.
    answers = iter(["cut", "cut"])

    def fault(method: str, path: str) -> int | str | None:
        return next(answers, 503) if method == "GET" and path.endswith(name) else None

    hub.fault = fault
    with pytest.raises(OSError):
        BudgetProfile.from_pretrained(REPO)
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{name}"))
    # Once the line is good again the same cache gives the whole profile.
    hub.fault = lambda method, path: None
    assert same(BudgetProfile.from_pretrained(REPO), PROFILE)


def test_a_line_that_always_breaks(hub: Hub, tmp_path: Path) -> None:
    hub.commit(REPO, PROFILE.to_files())
    hub.fault = lambda method, path: "cut" if method == "GET" else None
    # One byte is left after a dozen halves, and half of that is nothing, for ever.
    with pytest.raises(OSError, match=r"org/wave: expected an answer of the Hub, got .*try again"):
        BudgetProfile.from_pretrained(REPO)
    assert no_profile_in(tmp_path)


def test_other_content_than_the_digest_says(hub: Hub) -> None:
    content = PROFILE.to_files()
    content["statistics.safetensors"] = content["statistics.safetensors"][:-1] + b"\x01"
    hub.commit(REPO, content)
    with pytest.raises(ValueError, match=r"expected statistics\.safetensors with the SHA-256"):
        BudgetProfile.from_pretrained(REPO)


def test_missing_statistics(hub: Hub) -> None:
    hub.commit(REPO, {"config.json": PROFILE.to_files()["config.json"]})
    with pytest.raises(OSError, match=r"statistics\.safetensors"):
        BudgetProfile.from_pretrained(REPO)
    assert BudgetProfile.from_pretrained(REPO, with_statistics=False).demand == PROFILE.demand


@pytest.mark.parametrize("name", files.LIMITS)
def test_too_large_is_not_even_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub.commit(REPO, PROFILE.to_files())
    size = len(PROFILE.to_files()[name])
    monkeypatch.setitem(files.LIMITS, name, size - 1)
    with pytest.raises(ValueError, match=f"org/wave/{name}: expected at most .* got {size:,}"):
        BudgetProfile.from_pretrained(REPO)
    assert f"GET {REPO}/resolve/main/{name}" not in hub.requests
    assert not [
        request for request in hub.requests if request.startswith("GET") and name in request
    ]


@pytest.mark.parametrize("where", ["create", "preupload", "lfs", "commit", "validate-yaml"])
def test_server_error_while_pushing(hub: Hub, where: str) -> None:
    hub.commit(REPO, PROFILE.to_files())
    before = dict(hub.files(REPO))

    def fault(method: str, path: str) -> int | None:
        return 500 if where in path and method in {"POST", "PUT"} else None

    hub.fault = fault
    with pytest.raises(OSError):
        make_profile(demand=(1, 1, 1), statistics={"x": torch.ones(2, 3)}).push_to_hub(REPO)
    assert hub.files(REPO) == before


def test_server_error_while_pulling(hub: Hub, tmp_path: Path) -> None:
    hub.commit(REPO, PROFILE.to_files())
    hub.fault = lambda method, path: 500
    with pytest.raises(OSError):
        BudgetProfile.from_pretrained(REPO)
    assert no_profile_in(tmp_path)


@pytest.mark.parametrize(
    "name", ["no-slash", "a/b/c", "../../never", "org/..", "/etc/passwd", "org/na me", "org/n\0"]
)
def test_names_that_are_no_repository(hub: Hub, name: str) -> None:
    with pytest.raises(
        ValueError, match="expected a directory that exists, a profile of this package"
    ):
        BudgetProfile.from_pretrained(name)
    assert hub.requests == []
