"""The `ktrans` command as a person types it: what goes to stdout, to stderr, and the exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"
KTRANS = (sys.executable, "-m", "ktcompile.cli")  # as a process of its own
MACHINE = ("--gpu", "24G", "--ram", "512G")  # pages of a machine that is the same everywhere


def test_chat_prints_the_answer_alone_and_statistics_beside_it(ktrans):
    code, out, err = ktrans("chat", "--prompt", "What is the capital of France?", "--temperature", "0")
    assert code == 0
    assert out == "The capital of France is Paris.\n"
    for word in ("prompt 11 tokens", "prefill", "answer", "decode", "tok/s"):
        assert word in err


def test_chat_reads_a_prompt_file_and_stdin(ktrans, tmp_path):
    file = tmp_path / "a question – with ünicode.txt"
    file.write_text("What is the capital of France?\n")
    for args, stdin in ((("--prompt-file", file), ""), (("--prompt-file", "-"), "What is the capital of France?")):
        code, out, _ = ktrans("chat", *args, "--temperature", "0", stdin=stdin)
        assert code == 0
        assert "Paris" in out


def test_a_conversation_from_a_pipe_keeps_its_context(ktrans):
    code, out, err = ktrans(
        "chat",
        "--temperature",
        "0",
        stdin="What is the capital of France?\nTell me a story.\n/new\nWhat is the capital of Italy?\n",
    )
    assert code == 0
    assert "Paris" in out
    assert out.endswith("The capital of Italy is Rome.\n")
    assert "more from the cache" in err


def test_ctrl_c_stops_the_answer_not_the_program(ktrans, monkeypatch):
    from ktcompile.generate import Session

    real, calls = Session.stream, []

    def stream(self, prompt, most):
        calls.append(prompt)
        for i, piece in enumerate(real(self, prompt, most)):
            if len(calls) == 1 and i == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Session, "stream", stream)
    code, out, err = ktrans("chat", "--temperature", "0", stdin="Tell me a story.\nWhat is the capital of France?\n")
    assert code == 0
    assert "; stopped" in err
    assert out.count("\n") >= 2
    assert len(calls) == 2


def test_a_message_that_is_too_long_does_not_end_the_conversation(ktrans):
    long = "word " * 400
    code, out, err = ktrans(
        "chat", "--temperature", "0", "--context", "128", stdin=f"{long}\nWhat is the capital of France?\n"
    )
    assert code == 0
    assert "the context holds 128" in err
    assert out.endswith("The capital of France is Paris.\n")


def test_the_same_seed_gives_the_same_text(ktrans):
    texts = {
        ktrans("chat", "-p", "Tell me a story.", "--seed", "3", "--temperature", "1", "--max-new-tokens", "20")[1]
        for _ in range(2)
    }
    assert len(texts) == 1


def test_lossy_modes_are_named(ktrans):
    _, _, err = ktrans("chat", "-p", "Hello", "--experts", "6", "--max-new-tokens", "2")
    assert "lossy: 6 of 8 experts a token, ranked by choice" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("chat", "no/such/model.gguf"), ("no/such/model.gguf",)),
        (("chat", "-p", "a", "--prompt-file", "b"), ("give one of them",)),
        (("chat", "--prompt-file", "/no/file"), ("/no/file",)),
        (("chat", "-p", "a", "--temperature", "-1"), ("temperature -1", "0 to 100")),
        (("chat", "-p", "a", "--context", "0"), ("context 0", "1024")),
        (("chat", "-p", "a", "--dtype", "fp23"), ("fp23", "did you mean")),
        (("chat", "-p", "a", "--experts", "0"), ("keep = 0", "1 to 8")),
        (("chat", "-p", "a", "--cpu-threads", "99999"), ("99999 CPU threads",)),
        (("chat", "-p", "a", "--experts", "x"), ("--experts", "valid int")),
        (("chat", "-p", "a", "--experts", "9"), ("keep = 9", "1 to 8")),
        (("chat", "-p", " "), ("prompt is empty",)),
        (("explain", "--gpu", "24"), ("'24'", "24G")),
        (("explain", "--json", "--diff"), ("give one of them",)),
        (("explian",), ("explian",)),
        (("chat", str(DATA / "deepseek-v3-671b"), "-p", "a"), ("no weights",)),
        (("explain", "--rules", "bse"), ("did you mean 'base'",)),
        (("explain", "--after", "plce"), ("plce", "place")),
        (("explain", "--phase", "warmup"), ("decode and prefill",)),
        (("explain", "--gpu", "24X"), ("24X",)),
        (("explain", "--tokens", "100000000"), ("100000000 tokens", "holds 1024")),
        (("explain", "--tokens", "8", "--phase", "decode"), ("8 tokens", "there it is 1; prefill")),
        (("serve", "--port", "0", "--cache-lens", "1000000000000"), ("cache of 1000000000000 tokens", "at most")),
        (("chat", "-p", "hi", "--context", "2"), ("the prompt has 5 tokens; the context holds 2",)),
        (("explain", "--encoding", "q9"), ("q9", "q4_k_m")),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(ktrans, args, words):
    code, out, err = ktrans(*args)
    assert code == 2
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith("ktrans: ")]
    assert len(told) == 1
    for word in words:
        assert word in told[0]


def test_explain_shows_the_page(ktrans):
    code, out, _ = ktrans("explain", *MACHINE)
    assert code == 0
    assert len(out.splitlines()) < 70
    for word in ("L1.experts", "moe", "cuda:0", "q4_k", "L3-L4 as L1", "triton_planes"):
        assert word in out
    assert "# why not" in ktrans("explain", "--gpu", "none", "--ram", "512G")[1]


def test_explain_after_a_pass_and_for_a_phase(ktrans):
    _, out, _ = ktrans("explain", *MACHINE, "--after", "place", "--phase", "prefill", "--tokens", "300")
    assert ", after place" in out
    assert "prefill: 300 tokens" in out
    assert "[1,300,256]" in out
    assert "copy" not in out
    assert "prefill: 300 tokens" in ktrans("explain", *MACHINE, "--tokens", "300")[1]


def test_explain_diff_shows_what_each_pass_changed(ktrans, golden):
    _, out, _ = ktrans("explain", *MACHINE, "--diff")
    at = out.index("# insert-copies")
    golden("diff", out[:at])
    golden("diff_from_copies", out[at:])


def test_explain_writes_html_json_and_a_page_a_pass(ktrans, tmp_path):
    page, folder = tmp_path / "deep" / "page.html", tmp_path / "pages"
    code, out, err = ktrans("explain", *MACHINE, "--html", page, "--json", "--dump", folder)
    assert code == 0
    plan = json.loads(out)
    assert plan["version"] == 1
    assert {"name", "device", "kernel", "nbytes", "us"} <= set(plan["rows"][0])
    assert page.read_text().startswith("<!doctype html>")
    assert "http" not in page.read_text()
    assert [p.name for p in sorted(folder.iterdir())] == [
        "00-fold.txt",
        "01-widen.txt",
        "02-place.txt",
        "03-stream-experts.txt",
        "04-fuse-norms.txt",
        "05-insert-copies.txt",
        "06-choose-kernels.txt",
    ]
    assert str(page) in err


def test_explain_of_a_too_small_gpu_names_the_largest_regions(ktrans):
    code, _, err = ktrans("explain", "--gpu", "4M", "--ram", "1G")
    assert code == 2
    assert "cuda:0 needs" in err
    assert "largest" in err


def test_what_there_is(ktrans):
    for command, words in {
        "passes": ("fold", "prune-experts", "place", "insert-copies", "choose-kernels", "keep"),
        "kernels": ("avx512", "amx", "scalar", "reference", "triton"),
        "doctor": ("torch", "cpu", "kernels can run here"),
        "version": ("0.1.0",),
    }.items():
        code, out, _ = ktrans(command)
        assert code == 0
        for word in words:
            assert word in out
    if not torch.cuda.is_available():
        assert "encoded: any op on a GPU, cannot run here: there is no GPU" in ktrans("kernels")[1]


PEAK = """
import sys
from ktcompile.cli import main
try:
    main()
finally:
    sys.stderr.write(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_the_671b_model_is_planned_in_40_seconds_and_3_gb():
    """By what the process says of itself: what its parent learns at its end counts the parent before `exec` too."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "explain", DATA / "deepseek-v3-671b", "--encoding", "q4_k_m", *MACHINE],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    for word in ("deepseek-v3-671b, decode: 1 token", "cpu     368 GiB of 512 GiB", "L3.experts", "as L3", "lm_head"):
        assert word in done.stdout
    name, kib, unit = done.stderr.splitlines()[-1].split()
    assert (name, unit) == ("VmHWM:", "kB")
    assert int(kib) << 10 < 3e9
    assert seconds < 40


@pytest.mark.parametrize("command", ["passes", "--help", "explain"])
def test_a_reader_that_has_gone(command):
    """As with `| head`: nothing is said, least of all a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*KTRANS, command], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


@pytest.mark.parametrize("command", ["passes", "explain"])
def test_a_full_disk(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*KTRANS, command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "ktrans: no space is left for the output\n")


def test_a_packed_cache_is_told(ktrans, tmp_path):
    """The first start writes, the second reads; both answer the same."""
    command = (
        "chat",
        "-p",
        "What is the capital of France?",
        "--temperature",
        "0",
        "--packed-cache",
        tmp_path / "kept",
    )
    (_, first, wrote), (_, second, read) = ktrans(*command), ktrans(*command)
    assert first == second == "The capital of France is Paris.\n"
    assert "packed cache: 0 regions read from" in wrote and "5 written" in wrote
    assert "packed cache: 5 regions read from" in read and "0 written" in read


def test_convert_and_inspect(ktrans, tmp_path):
    target, command = tmp_path / "model.gguf", ("convert", DATA / "tiny-deepseek-v3")
    code, out, _ = ktrans(*command, target, "--to", "q8_0")
    assert code == 0 and "bits per weight" in out and "GB/s" in out
    code, out, _ = ktrans("inspect", target)
    assert code == 0 and "deepseek2" in out and "q8_0" in out
    code, out, _ = ktrans("inspect", target, "--json")
    assert code == 0 and json.loads(out)["architecture"]
    code, _, err = ktrans(*command, target, "--to", "q8_0")
    assert code == 2 and "--force" in err and err.count("\n") == 1
