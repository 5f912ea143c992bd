"""The end of an interpreter with work in flight: quiet, in time, and nothing saved is lost."""

import signal

import pytest

import kvengine
import rig

SEEDS = 12
BLOCKS = 8

WORK = """
import os, signal, sys, threading, rig, kvengine
of = rig.layout(layers=8, kv_heads=8, head_dim=64, head_dim_v=64)
engine = kvengine.open(f"mem://?size=64M | file://{sys.argv[1]}?size=256M")
names = rig.names(engine, of)
sources = [rig.caches(of, 8, seed) for seed in range(12)]
prompts = [names.keys(rig.prompt(8, of, seed)) for seed in range(12)]
saves = [engine.save(k, c, range(8)) for k, c in zip(prompts, sources)]
saves[0].wait()
lease = engine.match(prompts[0])
loads = [engine.load(lease, rig.caches(of, 8), range(8)) for _ in range(4)]
"""
CALLS = """
def calls():
    while True:
        engine.save(prompts[3], sources[3], range(8))
        with engine.match(prompts[0]) as lease:
            engine.load(lease, target, range(lease.blocks))
target = rig.caches(of, 8)
for _ in range(2):
    threading.Thread(target=calls, daemon=True).start()
"""
# How a program ends, its exit status, and the last line of what it says on stderr.
ENDS = {
    "last line": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "exception": ("raise RuntimeError('over')", 1, "RuntimeError: over"),
    "closed twice": ("engine.close(); engine.close()", 0, ""),
    "closed by a thread": ("threading.Thread(target=engine.close).start()", 0, ""),
    "no one holds the engine": ("del engine, names, prompts, saves, lease, loads", 0, ""),
    "threads that go on calling": (CALLS, 0, ""),
    "interrupted": ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", -2, "KeyboardInterrupt"),
}


@pytest.mark.parametrize(("end", "status", "says"), ENDS.values(), ids=ENDS)
def test_exit_with_work_in_flight(tmp_path, end, status, says):
    done = rig.python(WORK + end, tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.strip().rpartition("\n")[2] == says
    with kvengine.open(f"mem://?size=64M | file://{tmp_path}?size=256M") as engine:
        of = rig.layout(layers=8, kv_heads=8, head_dim=64, head_dim_v=64)
        names = rig.names(engine, of)
        for seed in range(SEEDS):
            keys = names.keys(rig.prompt(BLOCKS, of, seed))
            assert rig.check_right(engine, keys, rig.caches(of, BLOCKS, seed)).all(), seed
        assert engine.stats()["corrupt_blocks"] == 0


def test_sigterm_loses_what_was_not_flushed_and_no_more(tmp_path):
    """No handler is ours: the process ends at once, and the directory opens at once."""
    program = rig.start(WORK + "print(engine.flush(30), flush=True); signal.pause()", tmp_path)
    assert program.stdout.readline() == "True\n"
    program.terminate()
    assert program.wait(rig.WAIT_S) == -signal.SIGTERM
    program.communicate()
    with kvengine.open(f"mem://?size=64M | file://{tmp_path}?size=256M") as engine:
        of = rig.layout(layers=8, kv_heads=8, head_dim=64, head_dim_v=64)
        keys = rig.names(engine, of).keys(rig.prompt(BLOCKS, of, 0))
        assert rig.check_right(engine, keys, rig.caches(of, BLOCKS, 0)).all()
