"""Generators and ensembles on a stand-in of the Hugging Face Hub, which speaks as much of its protocol as is needed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from huggingface_hub import constants, file_download, utils
from safetensors.torch import load_file
from torch import nn

from pdiff_plugin import DiffusionEnsemble, Evaluation, WeightGenerator
from pdiff_plugin.cli import main
from pdiff_plugin.errors import ConfigError, FormatError, HubError
from pdiff_plugin.hub import hub_address

# huggingface_hub's own upload without Xet, to which the stand-in holds it, uses a spelling that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

DATA = Path(__file__).parent / "data"
FIT = DATA / "fit-v1"


@dataclass
class Repository:
    """Branches, each a list of commits, each the whole content."""

    is_private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def commit_of(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Id and content of a branch or a commit."""
        ids = {
            hashlib.sha1(f"{name} {number}".encode()).hexdigest(): files
            for name, commits in self.branches.items()
            for number, files in enumerate(commits)
        }
        if revision in self.branches:
            number = len(self.branches[revision]) - 1
            revision = hashlib.sha1(f"{revision} {number}".encode()).hexdigest()
        return (revision, ids[revision]) if revision in ids else None


@dataclass
class Hub:
    """What is on the server, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    token: str = "hf_right"

    def put(self, repo: str, name: str, content: bytes) -> None:
        self.repositories.setdefault(repo, Repository(False)).branches["main"].append({name: content})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        del args

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, document: object, status: int = 200) -> None:
        self.answer(status, json.dumps(document).encode(), Content_Type="application/json")

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        routes = {
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": lambda body: self.answer_json({"errors": [], "warnings": []}),
            r"POST /api/models/(.+?)/branch/(.+)": self.branch,
            r"POST /api/models/(.+?)/preupload/(.+)": self.preupload,
            r"POST /(.+?)\.git/info/lfs/objects/batch": self.batch,
            r"PUT /storage/(.+)": self.store,
            r"POST /api/models/(.+?)/commit/(.+)": self.commit,
            r"(?:HEAD|GET) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
            r"GET /api/models/(.+?)/revision/(.+)": self.info,
        }
        for pattern, act in routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                act(*found.groups(), *([body] if self.command in ("POST", "PUT") else []))
                return
        self.answer(501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815 (names of the library)

    def missing(self, code: str) -> None:
        self.answer(404, X_Error_Code=code, X_Error_Message=code)

    def create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer_json({"error": "Invalid username or password."}, 401)
            return
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        is_new = repo not in self.hub.repositories
        self.hub.repositories.setdefault(repo, Repository(asked.get("private") or asked.get("visibility") == "private"))
        self.answer_json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, 200 if is_new else 409)

    def branch(self, repo: str, name: str, body: bytes) -> None:
        branches = self.hub.repositories[repo].branches
        self.answer_json({}, 409 if name in branches else 200)
        branches.setdefault(name, list(branches["main"]))

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        del repo, revision
        modes = [
            {"path": file["path"], "uploadMode": "regular" if file["path"].endswith(".md") else "lfs"}
            for file in json.loads(body)["files"]
        ]
        self.answer_json({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def batch(self, repo: str, body: bytes) -> None:
        del repo
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        self.hub.blobs[oid] = body
        self.answer(200)

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        commits = self.hub.repositories[repo].branches[revision]
        files = dict(commits[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commits.append(files)
        oid, _ = self.hub.repositories[repo].commit_of(revision) or ("", {})
        self.answer_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def info(self, repo: str, revision: str) -> None:
        found = self.hub.repositories[repo].commit_of(revision) if repo in self.hub.repositories else None
        if found is None:
            self.missing("RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in found[1]]
        self.answer_json({"id": repo, "sha": found[0], "siblings": siblings, "tags": [], "downloads": 0})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        repository = self.hub.repositories.get(repo)
        is_known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.is_private and not is_known):
            self.missing("RepoNotFound")
            return
        found = repository.commit_of(revision)
        if found is None:
            self.missing("RevisionNotFound")
            return
        commit, files = found
        if name not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        content = files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=commit, Content_Length=str(len(content)))


def forget_whether_offline() -> None:
    """Releases of huggingface_hub before 1.0 keep to what they found first."""
    getattr(utils, "reset_sessions", lambda: None)()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the process talks to, as HF_ENDPOINT, HF_HOME and HF_TOKEN of a fresh one would have it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for module in (constants, file_download):  # releases before 1.0 look into the second
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as tests of trainers have it
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    forget_whether_offline()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def members(generator: WeightGenerator) -> dict[str, torch.Tensor]:
    return dict(generator.sample(3, rng=torch.Generator().manual_seed(0)))


def assert_equal(found: WeightGenerator, expected: WeightGenerator) -> None:
    for part in ("autoencoder", "frames", "denoiser"):
        one, other = (getattr(generator, part).state_dict() for generator in (found, expected))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    # Where a tensor lies in memory may decide about the last bit of a convolution.
    torch.testing.assert_close(members(found), members(expected))
    assert (found.config, found.report, found.layout) == (expected.config, expected.report, expected.layout)


@pytest.mark.parametrize("name", ["fit-v1", "fit-v1-conv", "fit-v1-aligned"])
def test_a_generator_comes_back_from_the_hub_as_it_was(hub: Hub, name: str) -> None:
    generator = WeightGenerator.load(DATA / name)

    address = generator.push_to_hub("ann/weights")

    assert address.startswith(f"{hub.url}/ann/weights/commit/")
    assert_equal(WeightGenerator.from_pretrained("ann/weights"), generator)


def test_a_repository_holds_one_safetensors_file_and_the_card_and_no_folder_of_the_author(hub: Hub) -> None:
    generator = WeightGenerator.load(FIT)
    generator = replace(generator, provenance={**generator.provenance, "store": "/home/ann/secret/runs-a"})

    generator.push_to_hub("ann/weights")

    files = hub.repositories["ann/weights"].branches["main"][-1]
    assert set(files) == {"generator.safetensors", "README.md"}
    assert all(b"secret" not in content for content in files.values())
    assert WeightGenerator.from_pretrained("ann/weights").provenance["store"] == "runs-a"


def test_only_the_file_that_is_asked_for_is_fetched(hub: Hub) -> None:
    hub.put("eve/weights", "generator.safetensors", (FIT / "generator.safetensors").read_bytes())
    hub.repositories["eve/weights"].branches["main"][-1]["pytorch_model.bin"] = b"a pickle"

    WeightGenerator.from_pretrained("eve/weights")

    assert {request.rpartition("/")[2] for request in hub.requests} == {"generator.safetensors"}


def test_a_revision_is_written_and_read_beside_the_main_branch(hub: Hub) -> None:
    first, second = WeightGenerator.load(FIT), WeightGenerator.load(DATA / "fit-v1-conv")
    first.push_to_hub("ann/weights")
    second.push_to_hub("ann/weights", branch="conv")
    commit, files = hub.repositories["ann/weights"].commit_of("conv") or ("", {})

    for revision in ("conv", commit):
        assert_equal(WeightGenerator.from_pretrained("ann/weights", revision=revision), second)
    assert_equal(WeightGenerator.from_pretrained("ann/weights"), first)
    assert 'from_pretrained("ann/weights", revision="conv")' in files["README.md"].decode()


def test_a_cached_generator_is_loaded_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("ann/weights", "generator.safetensors", (FIT / "generator.safetensors").read_bytes())
    WeightGenerator.from_pretrained("ann/weights")
    hub.requests.clear()

    assert_equal(WeightGenerator.from_pretrained("ann/weights", local_files_only=True), WeightGenerator.load(FIT))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_whether_offline()
    assert_equal(WeightGenerator.from_pretrained("ann/weights"), WeightGenerator.load(FIT))
    assert hub.requests == []
    with pytest.raises(HubError, match="hf://ann/other"):
        WeightGenerator.from_pretrained("ann/other")


def test_offline_a_process_of_its_own_takes_what_is_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    hub.put("ann/weights", "generator.safetensors", (FIT / "generator.safetensors").read_bytes())
    WeightGenerator.from_pretrained("ann/weights")
    hub.requests.clear()
    offline = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}

    command = [sys.executable, "-m", "pdiff_plugin.cli", "inspect", "hf://ann/weights", "--json"]
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["report"] == WeightGenerator.load(FIT).report
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "revision", "text"),
    [
        ("ann/none", None, "hf://ann/none: "),
        ("ann/weights", "v9", "Revision Not Found"),
        ("ann/empty", None, "Entry Not Found"),
        ("ann/a/b", None, "Repo id must be in the form"),
    ],
)
def test_what_is_not_on_the_hub_is_told_by_name(hub: Hub, repo: str, revision: str | None, text: str) -> None:
    hub.put("ann/weights", "generator.safetensors", b"")
    hub.put("ann/empty", "other.safetensors", b"")

    with pytest.raises(HubError) as error:
        WeightGenerator.from_pretrained(repo, revision=revision)

    assert text in str(error.value)
    assert str(error.value).endswith("`hf auth login` or HF_TOKEN.")


def test_a_hub_that_does_not_answer_or_refuses_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = WeightGenerator.load(FIT)
    with pytest.raises(HubError, match="Invalid username or password"):
        generator.push_to_hub("ann/weights", token="hf_wrong")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="hf://ann/weights: "):
        generator.push_to_hub("ann/weights")


def test_a_spoiled_generator_on_the_hub_is_refused_by_the_parser(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((FIT / "generator.safetensors").read_bytes())
    content[8:12] = b"\x80\x04]q"  # as a pickle would begin
    hub.put("eve/weights", "generator.safetensors", bytes(content))

    with pytest.raises(FormatError, match="an unreadable file"):
        WeightGenerator.from_pretrained("eve/weights")
    assert main(["inspect", "hf://eve/weights"]) == 1
    assert "FormatError" in capsys.readouterr().err


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def new_ensemble() -> DiffusionEnsemble:
    model = Net().eval()
    weights = {name: torch.randn(4, *tensor.shape) for name, tensor in model.norm.state_dict(prefix="norm.").items()}
    return DiffusionEnsemble(model, weights)


def test_an_ensemble_comes_back_from_the_hub_with_its_model(hub: Hub) -> None:
    ensemble, x = new_ensemble(), torch.randn(5, 8)

    ensemble.push_to_hub("ann/ensemble", branch="four")
    again = DiffusionEnsemble.from_pretrained("ann/ensemble", revision="four", model=Net().eval(), strategy="loop")

    assert again.num_members == 4
    assert torch.equal(again(x), DiffusionEnsemble(ensemble.model, ensemble.weights, strategy="loop")(x))
    assert again.strategy == "loop"


def card_of(folder: Path) -> tuple[dict[str, object], str]:
    """Metadata and text of a model card."""
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text.strip()


def run_code_of(text: str, **names: object) -> dict[str, object]:
    """Run the Python of a card, as a reader would who has these names."""
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    return names


def model_for(generator: WeightGenerator) -> nn.Module:
    """A module with the tensors of a generator's layout."""
    model = nn.Module()
    for spec in generator.layout:
        *path, name = spec.name.split(".")
        owner = model
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if spec.kind == "parameter":
            owner.register_parameter(name, nn.Parameter(torch.zeros(spec.shape)))
        else:
            owner.register_buffer(name, torch.zeros(spec.shape))
    return model


def test_the_code_on_the_card_of_a_generator_runs(hub: Hub) -> None:
    generator = WeightGenerator.load(FIT)
    generator.push_to_hub("ann/weights", base_model="timm/resnet18.a1_in1k")
    text = hub.repositories["ann/weights"].branches["main"][-1]["README.md"].decode()

    found = run_code_of(text, model=model_for(generator))

    assert isinstance(found["ensemble"], DiffusionEnsemble)
    assert found["ensemble"].num_members == 16
    assert isinstance(found["member"], dict)
    assert set(found["member"]) == set(generator.layout.names)


def test_the_code_on_the_card_of_an_ensemble_runs(hub: Hub) -> None:
    ensemble, x = new_ensemble(), torch.randn(5, 8)
    ensemble.push_to_hub("ann/ensemble")
    text = hub.repositories["ann/ensemble"].branches["main"][-1]["README.md"].decode()

    found = run_code_of(text, model=Net())["ensemble"]

    assert isinstance(found, DiffusionEnsemble)
    assert torch.equal(found(x), ensemble(x))
    assert "4 members of one Net" in text


def test_a_card_without_an_evaluation_says_so_first(tmp_path: Path) -> None:
    WeightGenerator.load(FIT).save_pretrained(tmp_path / "weights", base_model="timm/resnet18.a1_in1k")

    header, text = card_of(tmp_path / "weights")

    assert header["library_name"] == "pdiff-plugin"
    assert header["base_model"] == "timm/resnet18.a1_in1k"
    assert "pdiff" in str(header["tags"])
    assert text.splitlines()[:2] == ["# weights", ""]
    assert text.splitlines()[2].startswith("**Not evaluated: nothing is known of how good these weights are.")
    assert "How it was judged" not in text


def evaluation_of(generator: WeightGenerator) -> Evaluation:
    """The stored evaluation, as if it had judged this generator."""
    stored = Evaluation.load(DATA / "evaluation-v1")
    return replace(stored, details={**stored.details, "generator": {"report": generator.report}})


def test_a_card_begins_with_the_verdict_and_shows_the_table(tmp_path: Path) -> None:
    generator = WeightGenerator.load(FIT)
    evaluation = evaluation_of(generator)

    generator.save_pretrained(tmp_path, evaluation=evaluation)

    _, text = card_of(tmp_path)
    assert text.splitlines()[2] == f"**{evaluation.verdict.sentence}**"
    assert f"```text\n{evaluation.table_text()}\n```" in text
    assert "Not evaluated" not in text


def test_an_evaluation_of_another_fit_is_refused(tmp_path: Path) -> None:
    other = evaluation_of(WeightGenerator.load(DATA / "fit-v1-conv"))
    with pytest.raises(ConfigError, match="must be of this generator; judge it anew"):
        WeightGenerator.load(FIT).save_pretrained(tmp_path / "out", evaluation=other)
    assert not (tmp_path / "out").exists()


def test_a_card_that_somebody_has_edited_stays_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    WeightGenerator.load(FIT).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert_equal(WeightGenerator.from_pretrained(tmp_path), WeightGenerator.load(FIT))


def test_push_takes_the_evaluation_that_stands_beside_the_fit(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = WeightGenerator.load(FIT)
    generator.save(tmp_path / "fit")
    assert main(["push", str(tmp_path / "fit"), "ann/weights", "--private"]) == 0
    assert hub.repositories["ann/weights"].is_private
    assert "was not evaluated" in capsys.readouterr().err
    evaluation = evaluation_of(generator)
    evaluation.save(tmp_path / "fit" / "evaluation")

    assert main(["push", str(tmp_path / "fit"), "ann/weights", "--revision", "judged"]) == 0

    files = hub.repositories["ann/weights"].branches["judged"][-1]
    assert f"**{evaluation.verdict.sentence}**" in files["README.md"].decode()


def test_members_are_generated_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.put("ann/weights", "generator.safetensors", (FIT / "generator.safetensors").read_bytes())
    for number, source in enumerate([str(FIT), "hf://ann/weights@main"]):
        assert main(["generate", source, "--out", str(tmp_path / str(number)), "--num-members", "2"]) == 0
    one, other = (sorted((tmp_path / name).glob("member-*")) for name in ("0", "1"))
    assert len(one) == len(other) == 2
    for path, again in zip(one, other, strict=True):
        expected, found = load_file(path), load_file(again)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://ann/weights", ("ann/weights", None)),
        ("hf://ann/weights@v1.0/x", ("ann/weights", "v1.0/x")),
        (str(Path("hf://ann/weights@main")), ("ann/weights", "main")),
        ("fits/a", None),
        ("hf://ann", None),
        ("s3://ann/weights", None),
    ],
)
def test_an_address_on_the_hub_is_read(text: str, expected: tuple[str, str | None] | None) -> None:
    assert hub_address(text) == expected
