"""Streams: saved while they are decoded, forked without a copy, and a million tokens in windows."""

import threading

import numpy as np

import kvengine
import rig

OF = rig.layout(layers=2, kv_heads=1, head_dim=16, head_dim_v=16)
STEP = OF.block_tokens


def test_a_block_is_there_as_soon_as_its_last_token_is():
    """The stream goes on meanwhile: `save` returns at once, and what it reads is not written."""
    blocks, first = 6, 2
    tokens = rig.prompt(blocks, OF)
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, OF)
        source, cache = rig.caches(OF, blocks, 1), rig.caches(OF, blocks)
        keys = names.keys(tokens[: first * STEP])
        under_way = []
        for token in range(blocks * STEP):
            for layer, twin in zip(cache, source, strict=True):
                for one, other in zip(layer, twin, strict=True):
                    one[token // STEP, token % STEP] = other[token // STEP, token % STEP]
            if (token + 1) % STEP or token < first * STEP:
                continue
            block = token // STEP
            keys = keys.following(tokens[block * STEP : token + 1])
            assert keys.position == block and len(keys) == 1
            under_way.append(engine.save(keys, cache, [block]))
        # The prompt is saved last: blocks stand by themselves, a prefix is what is there.
        assert all(each.wait(rig.WAIT_S) and each.good.all() for each in under_way)
        whole = names.keys(tokens)
        assert engine.probe(whole) == 0 and engine.contains(whole).tolist()[first:] == [True] * 4
        rig.save(engine, whole[:first], source)
        assert rig.check_right(engine, whole, source).all()
        engine.check()


def test_keys_that_follow_are_those_of_the_whole():
    with kvengine.open("mem://?size=4M") as engine:
        names = rig.names(engine, OF)
        tokens = rig.prompt(7, OF)
        whole = names.keys(tokens)
        for cut in range(8):
            more = names.keys(tokens[: cut * STEP]).following(tokens[cut * STEP :])
            assert (more.data, more.position) == (whole[cut:].data, cut)
            assert more.parent == whole[cut:].parent
        partial = names.keys(tokens[: 2 * STEP]).following(tokens[: STEP - 1])
        assert len(partial) == 0 and partial.following(tokens[2 * STEP :]).data == whole[2:].data


def test_a_reader_sees_a_stream_grow_and_never_a_wrong_byte():
    blocks = 12
    tokens = rig.prompt(blocks, OF)
    with kvengine.open("mem://?size=16M") as engine:
        keys, source = rig.names(engine, OF).keys(tokens), rig.caches(OF, blocks, 1)
        seen, over = [], threading.Event()

        def read() -> None:
            while not over.is_set():
                seen.append(int(rig.check_right(engine, keys, source).sum()))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for block in range(blocks):
                rig.save(engine, keys[block : block + 1], source, [block])
                assert engine.probe(keys) == block + 1
        finally:
            over.set()
            reader.join()
        assert seen == sorted(seen)
        assert rig.check_right(engine, keys, source).all()


def test_samples_of_one_prompt_share_its_blocks():
    """A fork copies nothing: the prefix is saved once, held once, and leased by all."""
    samples, shared, own = 8, 5, 2
    prefix = rig.prompt(shared, OF)
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, OF)
        parent, source = names.keys(prefix), rig.caches(OF, shared + own, 1)
        rig.save(engine, parent, source, np.arange(shared))
        before = engine.stats()["memory_bytes"]
        leases = []
        for sample in range(samples):
            tokens = np.concatenate([prefix, rig.prompt(own, OF, 100 + sample)])
            keys = names.keys(tokens)
            saved = rig.save(engine, keys, source)
            assert saved.good.all() and saved.nbytes == own * OF.payload_bytes
            leases.append(engine.match(keys))
        assert engine.stats()["memory_bytes"] == before * (shared + samples * own) // shared
        slots = [engine._store.slots(lease.ids) for lease in leases]
        assert all((each[:shared] == slots[0][:shared]).all() for each in slots)
        assert len({tuple(each[shared:].tolist()) for each in slots}) == samples
        for lease in leases[:-1]:
            lease.release()
        engine.squeeze(0)  # what the last sample holds stays
        assert engine.probe(leases[-1].keys) == shared + own
        assert engine.stats()["memory_blocks"] == shared + own
        leases[-1].release()
        engine.squeeze(0)
        assert engine.stats()["memory_blocks"] == 0
        engine.check()


def test_a_million_tokens_in_windows():
    """One lease, loads of a window at a time into a cache of one window, without the lock."""
    of = rig.layout(
        layers=1, kv_heads=1, head_dim=4, head_dim_v=4, dtype="float16", block_tokens=512
    )
    count, window = (1 << 20) // of.block_tokens, 256
    tokens = np.arange(1 << 20, dtype=np.uint32)
    with kvengine.open("mem://?size=64M") as engine:
        keys = rig.names(engine, of).keys(tokens)
        source = rig.caches(of, count, 1)
        for at in range(0, count, window):
            rig.save(engine, keys[at : at + window], source, np.arange(at, at + window))
        target = rig.caches(of, window)
        rest(engine)
        with engine.match(keys) as lease:
            assert lease.blocks == count == 2048
            for at in range(0, count, window):
                transfer = engine.load(lease, target, np.arange(window), first=at)
                with engine._store._lock:
                    assert transfer.wait_layer(0, rig.WAIT_S), "bytes wait for the lock"
                assert transfer.wait(rig.WAIT_S) and transfer.good.all()
                here = rig.slots_of(of, range(window))
                there = rig.slots_of(of, range(at, at + window))
                assert rig.same(of, target, here, source, there)
        engine.check()


def rest(engine: kvengine.Engine) -> None:
    """Wait until no worker does a save's books any more: each of them meets the others here."""
    workers = engine._transfers._workers.count
    gate = threading.Barrier(workers + 1)
    for _ in range(workers):
        engine._transfers.submit(lambda: gate.wait(rig.WAIT_S) and None)
    gate.wait(rig.WAIT_S)
