"""Fork: the child's engine is detached, and the parent's goes on; each test is a program."""

import signal
from pathlib import Path

import kvengine
import rig

OF = rig.layout()
TOKENS = rig.prompt(6, OF)

START = """
import os, signal, sys, threading, rig, kvengine
import numpy as np
of = rig.layout()
source = rig.caches(of, 6, 1)
engine = kvengine.open(f"mem://?size=4M | file://{sys.argv[1]}?size=64M")
names = rig.names(engine, of)
keys = names.keys(rig.prompt(6, of))
assert rig.save(engine, keys, source).good.all() and engine.flush(30)

def files():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return [path for path in found if path.startswith(sys.argv[1])]

def in_child(work):
    child = os.fork()
    if not child:
        signal.alarm(30)  # a hang is an end by SIGALRM
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""

MISSES = """
lease, waiting = engine.match(keys), []

def child():
    assert not files(), files()
    assert engine.probe(keys) == 0 and not engine.contains(keys).any()
    assert engine.match(keys).blocks == 0
    target = rig.caches(of, 6)
    for transfer in (
        engine.load(lease, target, range(6)),
        engine.save(keys, source, range(6)),
        *waiting,
    ):
        assert transfer.wait(10) and transfer.wait_layer(0, 10)
        assert transfer.error or transfer.good.all()
    assert rig.untouched(of, target, [])
    assert engine.flush() and engine.drop(keys) == 0 and engine.squeeze(0) == 0
    assert engine.stats() == {} and b"kvengine_saved" in engine.metrics.text()
    for verb in (engine.drop_all, lambda: rig.names(engine, of)):
        try:
            verb()
        except kvengine.ClosedError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError("no error")
    lease.release()
    assert not bytes(engine._store.arena.memory).strip(bytes(1))
    with engine:
        pass
    engine.close()

stop = threading.Event()

def works(seed):
    mine, cache = names.keys(rig.prompt(6, of, seed)), rig.caches(of, 6, seed)
    while not stop.is_set():
        engine.save(mine, cache, range(6))
        rig.check_right(engine, mine, cache)
        engine.drop(mine)
        engine.stats()
        engine.metrics.text()

threads = [threading.Thread(target=works, args=(seed,)) for seed in range(2, 6)]
for thread in threads:
    thread.start()
try:
    for _ in range(12):
        with engine.match(keys) as held:
            waiting[:] = [engine.load(held, rig.caches(of, 6), range(6))]
            in_child(child)
finally:
    stop.set()
    for thread in threads:
        thread.join()
lease.release()
assert rig.check_right(engine, keys, source).all()
assert engine.flush(30)
engine.check()
engine.close()
print("fine")
"""


def test_every_verb_misses_in_the_child(tmp_path):
    """Whatever locks other threads of the parent hold meanwhile; and the parent loses nothing."""
    done = rig.python(START + MISSES, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        keys = rig.names(engine, OF).keys(TOKENS)
        assert rig.check_right(engine, keys, rig.caches(OF, 6, 1)).all()


OUTLIVES = """
child = os.fork()
if child:
    os.write(1, b"%d\\n" % child)
    signal.pause()
assert not files()
os.write(1, b"fine\\n")
sys.stdin.read()  # until the test lets go
"""


def test_the_parent_killed_while_its_child_lives(tmp_path):
    """The child keeps no lock: the directory opens at once, and all that was flushed is found."""
    parent = rig.start(START + OUTLIVES, tmp_path)
    said = {parent.stdout.readline().strip() for _ in range(2)}
    assert "fine" in said and len(said) == 2
    child = int((said - {"fine"}).pop())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert Path(f"/proc/{child}/status").exists()
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        keys = rig.names(engine, OF).keys(TOKENS)
        assert engine.probe(keys) == 6
        assert rig.check_right(engine, keys, rig.caches(OF, 6, 1)).all()
    assert parent.communicate()[1] == ""


OPENS = """
import multiprocessing, sys, rig, kvengine

def opens(path):
    of = rig.layout()
    with kvengine.open(f"mem://?size=4M | file://{path}?size=64M") as engine:
        keys = rig.names(engine, of).keys(rig.prompt(6, of))
        assert rig.save(engine, keys, rig.caches(of, 6, 1)).good.all()
        assert rig.check_right(engine, keys, rig.caches(of, 6, 1)).all()
        engine.check()

def fails(path):
    try:
        kvengine.open(f"file://{path}")
    except kvengine.DirectoryInUse:
        return
    raise AssertionError("two own one directory")

if __name__ == "__main__":
    mine, other = sys.argv[1:]
    with kvengine.open(f"mem://?size=4M | file://{mine}?size=64M") as engine:
        for kind in ("fork", "spawn"):  # the first at once, while kernels are still being loaded
            for work, path in ((opens, other), (fails, mine)):
                process = multiprocessing.get_context(kind).Process(target=work, args=(path,))
                process.start()
                process.join(50)
                assert process.exitcode == 0, (kind, work)
    print("fine")
"""


def test_a_child_opens_an_engine_of_its_own(tmp_path):
    """By fork and by spawn; not in the directory of its parent, who holds it."""
    program = tmp_path / "program.py"
    program.write_text(OPENS)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], {}, '__main__')"
    done = rig.python(code, program, tmp_path / "mine", tmp_path / "other")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
