"""The CPU engine and its supervisor, as processes, on a tiny model that is made here."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import BadRequestError, NotFoundError, OpenAI

from toolpost.serve.checks import ModelFolderError
from toolpost.serve.server import (
    Server,
    ServerError,
    Vllm,
    cpu_environment,
    session_members,
    vllm_command,
    vllm_environment,
)

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from toolpost.serve.completions import make_app
from toolpost.serve.engine import (
    Completion,
    Engine,
    EngineStoppedError,
    LocalModel,
    Task,
    complete_batch,
    load_local,
    pick_batch,
)

WINDOW = 256
BROKEN = "<|broken|>"  # the tokenizer knows this token, the model does not


def make_model(folder: Path, **config: Any) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    core.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    core.add_special_tokens([BROKEN])
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",  # noqa: S106
    ).save_pretrained(folder)
    torch.manual_seed(3)
    settings = {
        "vocab_size": 259,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.3,
        "eos_token_id": 256,
    }
    Qwen3ForCausalLM(Qwen3Config(**{**settings, **config})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    return load_local(folder)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with Server(folder, "tiny", threads=1, log=log, ready_timeout_s=120) as running:
        yield running


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)


def post(server: Server, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    url = f"{server.base_url}/completions"
    return httpx.post(url, content=content, headers=headers, timeout=120, trust_env=False)


def alone(local: LocalModel, task: Task) -> Completion:
    """What the engine answers if the task has a batch to itself."""
    found: list[Completion] = []
    complete_batch(local, [task], lambda _, answer: found.append(answer))
    return found[0]


def run_until(check: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not check() and time.monotonic() < until:
        time.sleep(0.05)
    return check()


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


PROMPTS = [f"{'the weather ' * (i % 7)}city number {i}?" for i in range(24)]


# The engine


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 100)), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 5000),
)
def test_a_batch_holds_the_oldest_task_and_stays_in_bounds(
    sizes: list[tuple[int, int]], rows: int, tokens: int
) -> None:
    waiting = [Task(prompt=(0,) * prompt, max_tokens=new) for prompt, new in sizes]
    chosen = pick_batch(waiting, rows, tokens)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= rows
    width = max(sizes[i][0] for i in chosen) + max(sizes[i][1] for i in chosen)
    assert len(chosen) == 1 or len(chosen) * width <= tokens


def test_the_engine_says_what_transformers_says(folder: Path, local: LocalModel) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text in PROMPTS[:6]:
        prompt = local.encode(text)
        ids = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=256
        )[0, len(prompt) :].tolist()
        answer = alone(local, Task(prompt=prompt, max_tokens=20))
        assert answer.tokens == len(ids)
        assert answer.text == local.decode([i for i in ids if i not in local.stop_ids])


def test_an_end_token_of_the_generation_config_ends_the_answer(
    folder: Path, local: LocalModel, tmp_path: Path
) -> None:
    model: Any = local.model
    prompt = local.encode("Hello")
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    new = ids[len(prompt) :]
    at, end = next((i, token) for i, token in enumerate(new) if token != new[0])
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, end]}))
    answer = alone(load_local(other), Task(prompt=prompt, max_tokens=20))
    assert answer == Completion(local.decode(new[:at]), "stop", at + 1)


def test_im_end_ends_an_answer_without_being_configured(local: LocalModel) -> None:
    assert local.tokenizer.convert_tokens_to_ids("<|im_end|>") in local.stop_ids


def test_special_tokens_are_left_out_and_the_tags_of_calls_are_not(local: LocalModel) -> None:
    ids = local.encode("a<tool_call>b<|endoftext|>")
    assert local.decode(ids) == "a<tool_call>b"
    assert local.decode(ids, skip_special=False) == "a<tool_call>b<|endoftext|>"


def test_weights_that_lack_a_tensor_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    other = shutil.copytree(folder, tmp_path / "other")
    config.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=r"lack \d+ tensors, model\.layers\.2"):
        load_local(other)


def test_sliding_attention_is_refused(tmp_path: Path) -> None:
    config = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    with pytest.raises(ModelFolderError, match="full attention only"):
        load_local(make_model(tmp_path, **config))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_tells_everybody(local: LocalModel) -> None:
    engine = Engine(local)
    http = TestClient(make_app(engine, "tiny"))
    ask = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
    assert (
        http.get("/health").status_code,
        http.post("/v1/completions", json=ask).status_code,
    ) == (
        200,
        200,
    )
    poison: Any = None  # no request can carry this: it kills the worker
    future = engine.submit(Task(prompt=poison, max_tokens=1))
    assert isinstance(future.exception(20), EngineStoppedError)
    assert http.get("/health").status_code == 503
    answer = http.post("/v1/completions", json=ask)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)


def test_closing_answers_those_who_wait(local: LocalModel) -> None:
    engine = Engine(local, max_rows=1)
    prompt = local.encode("Hi")
    futures = [engine.submit(Task(prompt=prompt, max_tokens=200)) for _ in range(20)]
    engine.close()
    assert isinstance(futures[-1].exception(10), EngineStoppedError)
    assert all(future.done() for future in futures)


# The protocol


def test_concurrent_ragged_prompts_get_the_answers_they_get_alone(
    client: OpenAI, local: LocalModel
) -> None:
    limits = [3 + (5 * i) % 40 for i in range(len(PROMPTS))]

    def ask(prompt: str, limit: int) -> tuple[str, str, int]:
        done = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=limit, temperature=0.001
        )
        assert done.usage is not None
        choice = done.choices[0]
        return choice.text, choice.finish_reason, done.usage.completion_tokens

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(ask, PROMPTS, limits))
    wanted = [
        alone(local, Task(prompt=local.encode(prompt), max_tokens=limit))
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    assert found == [(w.text, w.finish_reason, w.tokens) for w in wanted]
    assert len({text for text, _, _ in found}) > len(PROMPTS) // 2


def test_a_completion_has_the_shape_of_the_protocol(client: OpenAI, local: LocalModel) -> None:
    done = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=7, extra_body={"skip_special_tokens": False}
    )
    assert (done.object, done.model, done.choices[0].index) == ("text_completion", "tiny", 0)
    assert (done.choices[0].finish_reason, done.choices[0].logprobs) == ("length", None)
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(local.encode("Hello"))
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (7, 12)


@pytest.mark.parametrize("stop", [None, "e", "the"])
def test_a_stream_adds_up_to_the_answer(client: OpenAI, stop: str | None) -> None:
    for prompt in PROMPTS[:6]:
        asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "stop": stop}
        whole = client.completions.create(**asked)
        parts = list(
            client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(p.choices[0].text for p in parts[:-1]) == whole.choices[0].text
        assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert parts[-1].usage == whole.usage


@given(st.lists(st.binary(min_size=1, max_size=12), min_size=2, max_size=5), st.binary(max_size=30))
@settings(max_examples=20, deadline=None)
def test_a_common_beginning_that_is_read_once_changes_no_answer(
    local: LocalModel, ends: list[bytes], beginning: bytes
) -> None:
    tasks = [Task(prompt=tuple(beginning + end), max_tokens=8) for end in ends]
    found: dict[int, Completion] = {}
    complete_batch(local, tasks, found.__setitem__, least_shared=1)
    assert [found[i] for i in range(len(tasks))] == [alone(local, task) for task in tasks]


def test_a_row_ends_when_its_client_is_gone(local: LocalModel) -> None:
    gone, seen = threading.Event(), list[str]()

    def watch(text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            gone.set()

    long = Task(prompt=local.encode("Hello"), max_tokens=200, watch=watch, gone=gone)
    engine = Engine(local)
    stayed = engine.submit(replace(long, watch=None, gone=None))
    engine.submit(long).result(60)
    assert len(seen) == 3
    assert stayed.result(60).tokens > 3
    engine.close()


def test_sixteen_tokens_are_the_default(client: OpenAI) -> None:
    done = client.completions.create(model="tiny", prompt="Hello")
    assert done.usage is not None
    assert done.usage.completion_tokens == 16


def test_the_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_stop_token_ends_an_answer_and_is_not_in_it(client: OpenAI, local: LocalModel) -> None:
    model: Any = local.model
    prompt = local.encode("Hello")
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0].tolist()
    new = ids[len(prompt) :]
    stop = new[5]
    done = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=9, extra_body={"stop_token_ids": [stop]}
    )
    before = new[: new.index(stop)]
    assert (done.choices[0].text, done.choices[0].finish_reason) == (local.decode(before), "stop")
    assert done.usage is not None
    assert done.usage.completion_tokens == len(before) + 1


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_text_is_cut_off(client: OpenAI, as_list: bool) -> None:
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=30).choices[0].text
    stop = whole[10:12]
    done = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=30, stop=["\0never", stop] if as_list else stop
    )
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].text == whole[: whole.index(stop)]


GOOD = {"model": "tiny", "prompt": "Hello", "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"prompt": ["a", "b"]}, 400, ["prompt", "one string"]),
        ({"prompt": [1, 2]}, 400, ["prompt", "one string"]),
        ({"prompt": ""}, 400, ["prompt"]),
        ({"prompt": "x" * 1_000_001}, 400, ["prompt"]),
        ({"prompt": "\ud800"}, 400, ["prompt"]),
        ({"prompt": "x" * 250, "max_tokens": 10}, 400, ["256", "250", "10", "260"]),
        ({"max_tokens": 0}, 400, ["max_tokens"]),
        ({"max_tokens": -1}, 400, ["max_tokens"]),
        ({"max_tokens": "many"}, 400, ["max_tokens"]),
        ({"max_tokens": 256}, 400, ["256", "max_tokens"]),
        ({"temperature": 0.7}, 400, ["temperature", "greedy"]),
        ({"temperature": float("nan")}, 400, ["temperature", "greedy"]),
        ({"n": 2}, 400, ["n: "]),
        ({"stream": "yes, please"}, 400, ["stream"]),
        ({"echo": True}, 400, ["echo"]),
        ({"logprobs": 3}, 400, ["logprobs"]),
        ({"stop": ["a", ""]}, 400, ["stop"]),
        ({"model": "other"}, 404, ["other", "tiny"]),
        ({"prompt": f"Hello{BROKEN}"}, 500, ["IndexError"]),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_next_is_answered(
    server: Server, change: dict[str, Any], status: int, words: list[str]
) -> None:
    answer = post(server, GOOD | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert all(word in error["message"] for word in words), error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert post(server, GOOD).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(server: Server, body: bytes) -> None:
    answer = post(server, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
    assert post(server, GOOD).status_code == 200


def test_unknown_fields_are_ignored(server: Server) -> None:
    assert post(server, GOOD | {"top_k": 5, "guided_json": {}}).json()["choices"]


def test_an_unknown_path_has_an_error_of_the_same_shape(server: Server) -> None:
    answer = httpx.get(f"{server.base_url}/nothing", trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


def test_the_openai_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="one string"):
        client.completions.create(model="tiny", prompt=["a"])
    with pytest.raises(NotFoundError, match="tiny"):
        client.completions.create(model="other", prompt="a")


# The command


def engine_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolpost.serve.completions", *arguments],
        env=cpu_environment(os.environ, threads=1),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_part_ends_in_one_line(
    folder: Path, tmp_path: Path, name: str
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / name).unlink()
    done = engine_process("--model", str(broken))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(broken) in done.stderr
    assert f"*{Path(name).suffix}" in done.stderr or name in done.stderr


def test_a_port_in_use_ends_in_one_line(folder: Path, server: Server) -> None:
    done = engine_process("--model", str(folder), "--port", str(server.port))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {server.port}" in done.stderr


# The supervisor


def test_a_server_that_is_never_ready_is_ended(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    late = Server(folder, threads=1, log=log, ready_timeout_s=0.2)
    assert late.served_name == str(folder)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(
        ServerError, match=r"not ready after 0\.2 s; raise ready_timeout_s"
    ) as found:
        late.__enter__()
    assert str(log) in str(found.value)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert late.session is None
    assert late.port is not None
    assert is_free(late.port)


def test_a_server_that_ends_early_shows_its_log(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 5000)
    log = tmp_path / "logs" / "server.log"
    with pytest.raises(ServerError, match="exit code 2 before it was ready") as found:
        Server(broken, threads=1, log=log).__enter__()
    assert str(log) in str(found.value)
    assert f"{broken}: cannot be loaded" in str(found.value)
    assert "Traceback" not in log.read_text()


def test_what_is_wrong_is_said_before_anything_starts(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(ServerError, match=f"port {server.port} .* choose another port"):
        Server(folder, log=log, port=server.port).__enter__()
    with pytest.raises(ServerError, match=r"tokenizer|config\.json"):
        Server(tmp_path, log=log).__enter__()
    with pytest.raises(ServerError, match="make serve-env"):
        Server(folder, log=log, engine="vllm", vllm=Vllm(executable=tmp_path / "vllm")).__enter__()
    assert not log.exists()


PARENT = """
import sys
from pathlib import Path
from toolpost.serve.server import Server
with Server(Path(sys.argv[1]), "tiny", threads=1, log=Path(sys.argv[2])) as server:
    print(server.session, server.port, flush=True)
    sys.stdin.read()
"""


def test_the_engine_goes_when_its_user_is_killed(folder: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(tmp_path / "server.log")],
        env=cpu_environment(os.environ, threads=1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    session, port = map(int, parent.stdout.readline().split())
    assert len(session_members(session)) == 2
    assert not is_free(port)
    parent.kill()
    parent.wait(20)
    assert run_until(lambda: not session_members(session) and is_free(port), 10)
    parent.communicate()


# vLLM


def test_the_command_of_vllm(tmp_path: Path) -> None:
    executable = tmp_path / "vllm"
    executable.touch()
    options = Vllm(executable=executable, max_model_len=4096, gpu_memory_utilization=0.5)
    command = vllm_command(Path("/m/sft"), "sft", 8123, options)
    assert command[:3] == [str(executable), "serve", "/m/sft"]
    pairs = dict(zip(command[3::2], command[4::2], strict=False))
    assert pairs["--served-model-name"] == "sft"
    assert (pairs["--host"], pairs["--port"]) == ("127.0.0.1", "8123")
    assert (pairs["--max-model-len"], pairs["--gpu-memory-utilization"]) == ("4096", "0.5")
    assert pairs["--data-parallel-size"] == "1"
    assert command[-3:] == ["--enforce-eager", "--generation-config", "vllm"]
    graphs = options.model_copy(update={"enforce_eager": False})
    assert "--enforce-eager" not in vllm_command(Path("/m/sft"), "sft", 8123, graphs)


def test_the_environment_of_vllm(tmp_path: Path) -> None:
    libraries = tmp_path / "lib" / "python3.12" / "site-packages" / "nvidia" / "cudnn" / "lib"
    libraries.mkdir(parents=True)
    inherited = {"PYTHONPATH": "/ours", "LD_LIBRARY_PATH": "/theirs", "HOME": "/home/me"}
    found = vllm_environment(inherited, tmp_path / "bin" / "vllm")
    assert found["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert found["LD_LIBRARY_PATH"] == f"{libraries}:/theirs"
    assert found["HOME"] == "/home/me"
    assert "PYTHONPATH" not in found
