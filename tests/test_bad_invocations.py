"""What users get wrong: one line on stderr that names the thing and says what to do, exit code 2, nothing on stdout.

Each invocation runs in this process, on a real model of random weights; a few run once more as programs of their own.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_model import make_plan
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_model import CONFIG, HANDBOOK, save_tiny_model

from cocktail import calibrate, run, tune

ROOT = Path(__file__).parents[1]
MODEL = "tiny.safetensors"
ASK = [MODEL, "--context", "doc.txt", "--query", "Who?", "--max-tokens", "2"]
EIGHT_THOUSAND = "word " * 9000  # more than the model's 8,192 positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whole and broken, documents, plans and files of pairs."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny_model(folder, MODEL)
    save_tiny_model(folder, "short.safetensors", max_position_embeddings=256)
    save_tiny_model(folder, "plain.safetensors", template=None)
    tensors = load_file(folder / MODEL)
    with safe_open(folder / MODEL, "np") as file:
        metadata = file.metadata()

    def variant(name: str, dtype: str = "float32", **changes: str | None) -> None:
        kept = {key: text for key, text in (metadata | changes).items() if text is not None}
        save_file({key: tensor.astype(dtype) for key, tensor in tensors.items()}, folder / name, metadata=kept)

    variant("f64.safetensors", "float64")
    for name, changes in {"gpt2": {"architectures": ["GPT2LMHeadModel"]}, "layers": {"num_hidden_layers": 3},
                          "wide": {"hidden_size": 128}, "odd": {"head_dim": 12}}.items():
        variant(f"{name}.safetensors", **{"config.json": json.dumps(CONFIG | changes)})
    variant("noconfig.safetensors", **{"config.json": None})
    variant("badconfig.safetensors", **{"config.json": '{"architectures": '})
    variant("notokenizer.safetensors", **{"tokenizer.json": None})
    whole = (folder / MODEL).read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.safetensors").write_bytes(b"\xff" * 4096)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "empty").mkdir()
    (folder / "weights").mkdir()
    variant("weights/model.safetensors", **dict.fromkeys(metadata))
    shards = {"weight_map": dict.fromkeys(tensors, "gone.safetensors")}
    (folder / "shards.safetensors.index.json").write_text(json.dumps(shards))

    for name, data in {"doc.txt": HANDBOOK[:6000].encode(), "long.txt": (HANDBOOK * 3).encode(), "blank.txt": b" \n",
                       "latin1.txt": "caf\u00e9".encode("latin-1"), "binary.bin": bytes(range(128)),
                       "plan.json": make_plan().to_json().encode(), "noplan.json": b"{}",
                       "broken.json": b'{"version": '}.items():
        (folder / name).write_bytes(data)
    (folder / "pairs.json").write_text('{"version": 1, "pairs": ["K8V4", "K8V4"], "pareto": '
                                       '[{"bits": 3.6, "kl": 0.1, "pairs": ["K4V2", "K3V2"]}]}')
    (folder / "pairs3.json").write_text('{"version": 1, "pairs": ["K8V4", "K8V4", "K8V4"]}')
    return folder


# Every line: arguments, and parts of the message.
BAD = [
    # the model
    ([], "MODEL"),
    (["--query", "Hi"], "required: MODEL"),
    (["nowhere", "--query", "Hi"], "nowhere: no such file or folder"),
    (["empty", "--query", "Hi"], "empty: expected one checkpoint in this folder, found none", "python -m converters"),
    (["weights", "--query", "Hi"], "weights/model.safetensors: config.json is missing: expected it in weights or"),
    (["shards.safetensors.index.json", "--query", "Hi"], "gone.safetensors"),
    (["model.gguf", "--query", "Hi"], "model.gguf: expected a .safetensors,", "python -m converters"),
    (["doc.txt", "--query", "Hi"], "doc.txt: expected a .safetensors,"),
    (["f64.safetensors", "--query", "Hi"], "expected F32 or F16 or BF16, got F64; save it in one of those"),
    (["gpt2.safetensors", "--query", "Hi"], "gpt2.safetensors", "LlamaForCausalLM", "got ['GPT2LMHeadModel']"),
    (["layers.safetensors", "--query", "Hi"], "'model.layers.2.self_attn.q_proj.weight' of shape [64, 64] is missing"),
    (["wide.safetensors", "--query", "Hi"], "wide.safetensors: tensor", "expected shape [400, 128], got [400, 64]"),
    (["odd.safetensors", "--query", "Hi"], "head_dim must be a multiple of 8 up to 256, but is 12"),
    (["noconfig.safetensors", "--query", "Hi"], "noconfig.safetensors: config.json is missing"),
    (["badconfig.safetensors", "--query", "Hi"], "badconfig.safetensors: config.json: not valid JSON"),
    (["notokenizer.safetensors", "--query", "Hi"], "notokenizer.safetensors: there is neither tokenizer.json"),
    (["truncated.safetensors", "--query", "Hi"], "truncated.safetensors: truncated: the header describes"),
    (["garbage.safetensors", "--query", "Hi"], "garbage.safetensors: truncated, or not a safetensors file"),
    # what is asked
    ([MODEL], "there is no --query"),
    ([MODEL, "extra", "--query", "Hi"], "unrecognized arguments: extra (see --help)"),
    ([MODEL, "--nonsense"], "--nonsense"),
    ([MODEL, "--query"], "--query/--prompt: expected one argument"),
    ([MODEL, "--query", " "], "--query is empty and there is no --context"),
    ([MODEL, "--context", "doc.txt"], "there is no --query"),
    ([MODEL, "--context", "nowhere.txt", "--query", "Hi"], "--context nowhere.txt: No such file"),
    ([MODEL, "--context", ".", "--query", "Hi"], "--context .: Is a directory"),
    ([MODEL, "--context", "", "--query", "Hi"], "--context is empty; expected a file's name"),
    ([MODEL, "--context", "blank.txt", "--query", "Hi"], "--context blank.txt is empty"),
    ([MODEL, "--context", "latin1.txt", "--query", "Hi"], "latin1.txt is not UTF-8 (byte 3 is 0xe9)", "iconv"),
    ([MODEL, "--context", "binary.bin", "--query", "Hi"], "binary.bin is no text: byte 0 is 0; extract its text first"),
    ([MODEL, "--context", MODEL, "--query", "Hi"], f"{MODEL} is not UTF-8"),
    ([MODEL, "--context", "-", "--query", "Hi"], "--context stdin is empty"),
    ([MODEL, "--context", "-", "--query", "-"], "stdin can be read once"),
    ([*ASK, "--plan-in", "-", "--context", "-"], "stdin can be read once"),
    ([MODEL, "--context", "long.txt", "--query", "Hi"], "but the model has 8192 positions; shorten the prompt"),
    ([MODEL, "--query", EIGHT_THOUSAND], "but the model has 8192 positions; shorten the prompt"),
    ([MODEL, "--context", "doc.txt", "--query", EIGHT_THOUSAND], "but the model has 8192 positions"),
    (["short.safetensors", *ASK[1:]], "the prompt has 3017 tokens", "the model has 256 positions"),
    (["short.safetensors", "--query", "Hi", "--max-tokens", "500"], "500 are to be generated", "lower max_tokens"),
    ([MODEL, "--raw"], "--raw completes --query alone"),
    ([*ASK, "--raw"], "--raw completes --query alone"),
    ([*ASK, "--no-history"], "--no-history is about what is typed in the loop"),
    (["plain.safetensors", "--query", "Hi", "--system", "Be brief."], "--system: this model has no chat template"),
    # several questions, saved documents
    ([*ASK, "--queries", "nowhere.txt"], "--queries nowhere.txt: No such file"),
    ([*ASK, "--queries", "blank.txt"], "--queries blank.txt is empty"),
    ([MODEL, "--query", "Hi", "--query", "Ho"], "several questions are about a document; give one with --context"),
    ([MODEL, "--queries", "doc.txt"], "several questions are about a document"),
    ([*ASK, "--query", "-", "--queries", "-"], "stdin can be read once"),
    ([*ASK, "--query", "Why?", "--plan-out", "out.json"], "--plan-out writes one plan"),
    ([*ASK, "--query", "Why?", "--stats", "json"], "every line on stdout has its statistics already"),
    ([*ASK, "--document", "doc.kv"], "--context does not go with --document"),
    ([MODEL, "--document", "doc.kv", "--chunk", "16", "--query", "Hi"], "--chunk does not go with --document"),
    ([MODEL, "--document", "doc.kv", "--query", "Hi"], "doc.kv: no such file or folder"),
    ([MODEL, "--document", "doc.txt", "--query", "Hi"], "doc.txt: truncated, or not a safetensors file"),
    ([MODEL, "--document", MODEL, "--query", "Hi"], "a safetensors file, but no saved document"),
    ([MODEL, "--query", "Hi", "--save-document", "doc.kv"], "--save-document is about a document"),
    ([*ASK, "--save-document", "nowhere/doc.kv"], "--save-document nowhere/doc.kv: its folder does not exist"),
    # many questions, a document read before, a report
    ([MODEL, "--query", "a", "--query", "b"], "several questions are about a document; give one with --context"),
    ([MODEL, "--context", "doc.txt", "--queries", "nowhere.txt"], "--queries nowhere.txt: No such file"),
    ([MODEL, "--context", "doc.txt", "--queries", "blank.txt"], "--queries blank.txt is empty; expected text"),
    ([MODEL, "--context", "doc.txt", "--queries", "-", "--query", "-"], "stdin can be read once"),
    ([MODEL, "--context", "doc.txt", "--queries", "doc.txt", "--plan-out", "p.json"], "--plan-out writes one plan"),
    ([MODEL, "--query", "Hi", "--document", "nowhere.doc"], "nowhere.doc: no such file"),
    ([MODEL, "--query", "Hi", "--document", "garbage.safetensors"], "garbage.safetensors: truncated, or not a"),
    ([MODEL, "--query", "Hi", "--document", MODEL], f"{MODEL}"),
    ([MODEL, "--query", "Hi", "--document", "x.doc", "--context", "doc.txt"], "--context does not go with --document"),
    ([MODEL, "--query", "Hi", "--save-document", "x.doc"], "--save-document is about a document; give one with"),
    ([MODEL, "--context", "doc.txt", "--save-document", "empty"], "--save-document empty: expected the name of a file"),
    ([*ASK, "--report", "nowhere/page.html"], "--report nowhere/page.html: its folder does not exist"),
    ([MODEL, "--query", "Hi", "--report", "page.html"], "--report is about a document and its cache"),
    # policy, budget, scorer
    ([MODEL, "--query", "Hi", "--kv-bits", "3"], "--kv-bits is about a document and its cache; give one"),
    ([MODEL, "--query", "Hi", "--show-plan"], "--show-plan is about a document"),
    ([MODEL, "--query", "Hi", "--sink", "0"], "--sink is about a document"),
    ([*ASK, "--policy", "magic"], "there is no policy 'magic'; expected one of"),
    ([*ASK, "--policy", ""], "there is no policy ''; expected one of"),
    ([*ASK, "--policy", "fp16", "--kv-bits", "3"], "policy fp16 has no option kv_bits"),
    ([*ASK, "--policy", "fp16", "--scorer", "bm25"], "policy fp16 looks at no scores"),
    ([*ASK, "--policy", "cocktail", "--kv-bits", "3"], "policy cocktail has no option kv_bits"),
    ([*ASK, "--policy", "cocktail", "--alpha", ".9"], "alpha + beta is 1"),
    ([*ASK, "--policy", "cocktail", "--scorer", "attention"], "policy cocktail sizes the cache by the scores"),
    ([*ASK, "--policy", "cocktail", "--formats", "zip"], "formats are 'zip'; expected one of rotated, kivi,"),
    ([*ASK, "--policy", "cocktail", "--formats", "atom"], "there is no K2V2 in the atom formats"),
    ([*ASK, "--policy", "kivi", "--bits", "9"], "bits is 9; expected one of 2, 3, 4, 8"),
    ([*ASK, "--policy", "kivi", "--sink", "0"], "policy kivi has no option sink"),
    ([*ASK, "--policy", "uniform"], "policy uniform needs a tier"),
    ([*ASK, "--policy", "uniform", "--tier", "K4"], "of the form K3V2"),
    ([*ASK, "--policy", "uniform", "--tier", "K7V7"], "tier k_bits is 7; expected one of 0, 2, 3, 4, 8, 16"),
    ([*ASK, "--policy", "uniform", "--tier", "K4V4", "--scorer", "bm25"], "policy uniform looks at no scores"),
    ([*ASK, "--alpha", ".9"], "policy budget has no option alpha; it has kv_bits,"),
    ([*ASK, "--no-search"], "policy budget has no option no_search"),
    ([*ASK, "--formats", "kivi"], "policy budget has no option formats"),
    ([*ASK, "--kv-bits", "-3"], "--kv-bits: '-3'; expected a number of at least 0"),
    ([*ASK, "--kv-bits", "0"], "kv_bits is 0"),
    ([*ASK, "--kv-bits", "nan"], "--kv-bits: 'nan'"),
    ([*ASK, "--kv-bits", "inf"], "--kv-bits: 'inf'"),
    ([*ASK, "--kv-bits", "1"], "kv_bits is 1; expected at least 2.", "which is K2V2 throughout in this document"),
    ([*ASK, "--kv-bits", "3", "--kv-budget", "1MB"], "kv_bits and kv_budget"),
    ([*ASK, "--kv-budget", "1KB"], "kv_budget is 1,000 bytes; expected at least 14"),
    ([*ASK, "--kv-budget", "-1GB"], "--kv-budget"),
    ([*ASK, "--kv-budget", "12 parsecs"], "kv_budget is '12 parsecs'; expected bytes, such as"),
    ([*ASK, "--tiers", "K3V2,K5V5"], "tier k_bits is 5"),
    ([*ASK, "--tiers", "INT4"], "of the form K3V2"),
    ([*ASK, "--tiers", "K8V8,K2V2"], "tiers are K8V8,K2V2; expected low to high"),
    ([*ASK, "--shares", ".1"], "there are shares but no tiers", "give both"),
    ([*ASK, "--tiers", "K3V2,K8V8", "--shares", ".1,.2"], "2 shares for 2 tiers", "one for each tier but the lowest"),
    ([*ASK, "--tiers", "K3V2,K8V8", "--shares", "1.5"], "shares are '1.5'; expected numbers from 0 to 1"),
    ([*ASK, "--sink", "-1"], "--sink: '-1'; expected an integer of at least 0"),
    ([*ASK, "--sink", "100000"], "--sink is 100000; the document has 93 whole chunks of 32 tokens"),
    ([*ASK, "--sink", "93", "--kv-bits", "3.3"], "kv_bits is 3.3; expected at least 16.0", "93 sink chunks"),
    ([*ASK, "--chunk", "0"], "--chunk: '0'; expected an integer of at least 1"),
    ([*ASK, "--chunk", "12"], "chunk is 12; expected a multiple of 8 from 8 to 256"),
    ([*ASK, "--scorer", "magic"], "scorer 'magic' is neither one of bm25,"),
    ([*ASK, "--scorer", "empty"], "cannot load encoder empty: empty/tokenizer.json: no such file"),
    ([*ASK, "--scorer", "hybrid"], "scorer hybrid needs an encoder"),
    ([*ASK, "--scorer", "random:x"], "scorer random: seed is 'x'; expected an integer"),
    ([*ASK, "--scorer", "endpoint:m"], "scorer endpoint: its base URL is None; set OPENAI_BASE_URL"),
    # files of plans, pairs and levels
    ([*ASK, "--plan-in", "nowhere.json"], "--plan-in nowhere.json: No such file"),
    ([*ASK, "--plan-in", "broken.json"], "--plan-in broken.json: plan is not valid JSON"),
    ([*ASK, "--plan-in", "noplan.json"], "--plan-in noplan.json: plan version is None; expected", "make a new plan"),
    ([*ASK, "--plan-in", "plan.json"], "the plan does not fit", "head_dim is 8, expected 16", "make a new plan"),
    ([*ASK, "--plan-in", "plan.json", "--policy", "fp16"], "--plan-in already decides what --policy would"),
    ([*ASK, "--plan-out", "empty"], "--plan-out empty: expected the name of a file, not a folder's"),
    ([MODEL, "--query", "Hi", "--dry-run"], "--dry-run is about one question to a document; give --context and"),
    ([MODEL, "--query", "Hi", "--verify"], "--verify is about a document"),
    ([*ASK, "--verify", "twice"], "--verify: invalid choice: 'twice'"),
    ([*ASK, "--verify", "--verify-kl", "1"], "--verify-kl is the bound of --verify promote"),
    ([*ASK, "--verify", "promote", "--plan-in", "plan.json"], "--verify promote raises a budget, and"),
    ([*ASK, "--verify", "promote", "--policy", "cocktail"], "policy cocktail has no budget to raise"),
    ([*ASK, "--dry-run", "--verify"], "--dry-run makes no answer, so there is nothing to --verify"),
    ([*ASK, "--pin", "nobody wrote this"], "the text to pin does not occur in the document: 'nobody wrote this'"),
    ([*ASK, "--pin", " "], "a text to pin is empty"),
    ([*ASK, "--pin", "the", "--policy", "fp16"], "policy fp16 does not choose by chunk, so it can pin none"),
    ([*ASK, "--pin", "the", "--plan-in", "plan.json"], "--plan-in already decides what --pin would"),
    ([*ASK, "--report", "nowhere/out.html"], "--report nowhere/out.html: its folder does not exist"),
    ([*ASK, "--plan-out", "nowhere/plan.json"], "--plan-out nowhere/plan.json: its folder does not exist"),
    ([*ASK, "--policy", "kvtuner"], "policy kvtuner needs pairs: a file made by python -m cocktail.tune"),
    ([*ASK, "--policy", "kvtuner", "--pairs", "nowhere.json"], "pairs file nowhere.json: No such file"),
    ([*ASK, "--policy", "kvtuner", "--pairs", "pairs3.json"], "pairs3.json is for 3 layers; the model has 2 layers"),
    ([*ASK, "--pairs", "broken.json"], "pairs file broken.json is not valid JSON"),
    ([*ASK, "--pairs", "noplan.json"], 'pairs file noplan.json: "version" is None; expected 1'),
    ([*ASK, "--pairs", "pairs.json"], 'pairs.json has no "losses", which policy budget goes by'),
    ([*ASK, "--policy", "kvtuner", "--pairs", "pairs.json", "--pairs-bits", "3"], "no trade-off of at most 3 bits"),
    ([*ASK, "--policy", "cocktail", "--pairs-bits", "3"], "no pairs file to choose from"),
    ([*ASK, "--pairs", "pairs.json", "--pairs-bits", "3"], "policy budget has no option pairs_bits"),
    ([*ASK, "--policy", "kvquant"], "the kvquant formats need a calibration, a file made by"),
    ([*ASK, "--policy", "kvquant", "--calibration", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    ([*ASK, "--policy", "kvquant", "--calibration", MODEL], f'calibration {MODEL}: "version" is None'),
    # sampling, machine, report
    ([*ASK, "--max-tokens", "0"], "--max-tokens: '0'; expected an integer of at least 1"),
    ([*ASK, "--max-tokens", "many"], "--max-tokens: 'many'"),
    ([*ASK, "--seed", "-1"], "--seed: '-1'"),
    ([*ASK, "--temperature", "-1"], "--temperature: '-1'"),
    ([*ASK, "--temperature", "1e9"], "temperature is 1000000000.0; expected a number from 0 to 100"),
    ([*ASK, "--temperature", "1", "--top-p", "2"], "top_p is 2.0"),
    ([*ASK, "--repetition-penalty", "0"], "repetition_penalty is 0.0; expected a number from 0.01"),
    ([*ASK, "--top-k", "5"], "--top-k changes nothing at temperature 0", "add --temperature"),
    ([*ASK, "--stop", ""], "--stop is empty"),
    ([*ASK, "--threads", "-2"], "--threads: '-2'"),
    ([*ASK, "--threads", "100000"], "threads must be at most 256, but is 100000"),
    ([*ASK, "--backend", "tpu"], "--backend: invalid choice: 'tpu'"),
    ([*ASK, "--no-graph"], "--no-graph is about CUDA graphs; it does not go with --backend cpu"),
    ([*ASK, "--stats", "yaml"], "--stats: invalid choice: 'yaml'"),
    ([*ASK, "--log-level", "loud"], "--log-level: 'loud'; expected one of debug, info, warning, error"),
    ([*ASK, "--print-completion", "fish"], "--print-completion: invalid choice: 'fish'"),
]


def name(arguments: list[str]) -> str:
    return " ".join(arguments).replace(" ".join(ASK), "...")[:60] or "nothing"


@pytest.mark.parametrize(("arguments", "parts"), [(arguments, parts) for arguments, *parts in BAD],
                         ids=[name(arguments) for arguments, *_ in BAD])
def test_one_line_exit_code_2_and_what_to_do(folder, capsys, monkeypatch, arguments, parts):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert_refused(run.main, ["--backend", "cpu", "--threads", "1", *arguments], parts, capsys)


OTHERS = [
    (tune, [MODEL, "--out", "out.json"], "give one of --prompts and --text"),
    (tune, [MODEL, "--text", "doc.txt"], "required: --out"),
    (tune, [MODEL, "--text", "doc.txt", "--out", "nowhere/out.json"], "nowhere/out.json: its folder does not exist"),
    (tune, [MODEL, "--text", "doc.txt", "--out", "out.json", "--trials", "0"], "--trials is 0; expected at least 1"),
    (tune, ["nowhere", "--text", "doc.txt", "--out", "out.json"], "nowhere: no such file or folder"),
    (tune, [MODEL, "--text", "nowhere.txt", "--out", "out.json"], "nowhere.txt"),
    (calibrate, ["zip", MODEL, "--out", "out.safetensors"], "invalid choice: 'zip'"),
    (calibrate, ["kvquant", MODEL, "--out", "out.safetensors", "--tokens", "9"], "--tokens is 9; expected at least"),
    (calibrate, ["kvquant", MODEL, "--out", "out.safetensors", "--tokens", "9999"], "the model has 8192 positions"),
]


@pytest.mark.parametrize(("command", "arguments", "part"), OTHERS,
                         ids=[f"{command.__name__} {name(arguments)}" for command, arguments, _ in OTHERS])
def test_the_other_commands_too(folder, capsys, monkeypatch, command, arguments, part):
    pytest.importorskip("optuna")
    monkeypatch.chdir(folder)
    assert_refused(command.main, arguments, [part], capsys)


def assert_refused(main, arguments, parts, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    for part in parts:
        assert part in err
    assert (code, out) == (2, "")


@pytest.mark.parametrize(("arguments", "part"), [
    (["nowhere", "--query", "Hi"], "nowhere: no such file or folder"),
    ([MODEL, "--context", "long.txt", "--query", "Hi"], "8192 positions"),
    ([*ASK, "--kv-bits", "1"], "kv_bits is 1"),
    ([MODEL], "there is no --query"),
])
def test_as_a_program_of_its_own(folder, arguments, part):
    done = subprocess.run([sys.executable, "-m", "cocktail.run", "--backend", "cpu", *arguments], cwd=folder, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert part in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as Linux has it")
def test_a_full_disk_behind_stdout(folder):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "cocktail.run", *ASK], cwd=folder, stdout=full, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")
