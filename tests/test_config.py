from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvengine.config import (
    ENVIRONMENT_OF,
    SETTINGS,
    Config,
    Daemon,
    Disk,
    Objects,
    Secret,
    Valkey,
    parse_url,
    size_bytes,
)
from kvengine.errors import ConfigError

HEX = "00112233445566778899aabbccddeeff" * 2
G = 1 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4G", 4 * G),
        ("512M", 512 << 20),
        ("1.5T", 3 << 39),
        ("64K", 64 << 10),
        ("1 GiB", G),
        ("100GB", 100 * G),
        ("123", 123),
        (123, 123),
        (0, 0),
    ],
)
def test_sizes(text, nbytes):
    assert size_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "4g", "1.G", "4 P", "٣G", "2097152T", 1.5])
def test_texts_that_are_no_size(text):
    with pytest.raises(ConfigError, match=r"memory_bytes \(option\): given .*expected a size"):
        Config.load(options={"memory_bytes": text}, environ={})


@given(st.integers(64 << 10, 1 << 60), st.sampled_from("KMGT"))
def test_sizes_are_read_exactly(nbytes, unit):
    assert Config(memory_bytes=nbytes).memory_bytes == nbytes
    power = {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
    if (nbytes >> power) > 0:
        assert size_bytes(f"{nbytes >> power}{unit}") == nbytes >> power << power


def test_defaults():
    config, origins = Config.load(environ={})
    assert config == Config() == parse_url("mem://")
    assert config.memory_bytes == G
    assert (config.disk, config.secret, config.policy) == (None, None, "lru")
    assert (config.threads, config.io_threads) == (2, 2)
    assert (config.lease_s, config.reservation_s, config.find_s) == (60, 60, 0.1)
    assert set(origins.values()) == {"default"}
    assert set(origins) == set(SETTINGS)


def test_url_says_memory_and_disk():
    config = parse_url("mem://?size=4G | file:///var/cache/kv?size=100G&segment=256M&durable=1")
    assert config.memory_bytes == 4 * G
    disk = Disk(path="/var/cache/kv", size_bytes=100 * G, segment_bytes=G >> 2, durable=True)
    assert config.disk == disk


def test_shadows_and_a_recording():
    config = parse_url("mem://?shadow=arc,s3fifo,arc&record=/tmp/asked.jsonl")
    assert (config.shadow, config.record) == (("arc", "s3fifo"), "/tmp/asked.jsonl")
    assert Config(shadow=["ttl"]).shadow == ("ttl",)
    assert Config(shadow="").shadow == ()
    with pytest.raises(ConfigError, match=r"shadow \(url\): given 'arg', did you mean 'arc'"):
        parse_url("mem://?shadow=lru,arg")
    with pytest.raises(ConfigError, match="expected names of policies, as in arc,s3fifo"):
        Config(shadow=3)


def test_url_says_remote_tiers():
    secret = {"secret": HEX}
    url = "mem:// | redis://me:p%40ss@[::1]:7000/3?ttl_s=60&prefix=kv/&connections=4&timeout_s=2"
    assert Config.load(url, options=secret, environ={})[0].valkey == Valkey(
        host="::1",
        port=7000,
        db=3,
        user="me",
        password=Secret(b"p@ss"),
        prefix="kv/",
        ttl_s=60.0,
        timeout_s=2.0,
        connections=4,
    )
    for scheme, tls in (("valkey", False), ("valkeys", True), ("rediss", True)):
        valkey = Config.load(f"{scheme}://h", options=secret, environ={})[0].valkey
        assert valkey == Valkey(host="h", tls=tls)
    url = "file:///kv | valkey://h?cluster=1 | s3://b/some/prefix/?endpoint=http://h:9&region=r"
    config = parse_url(url)
    assert config.disk == Disk(path="/kv") and config.valkey.cluster
    assert config.objects == Objects(url="s3://b/some/prefix", endpoint="http://h:9", region="r")
    for url in ("gs://bucket/prefix", "az://container/prefix"):
        assert Config.load(url, options=secret, environ={})[0].objects == Objects(url=url)


def test_a_remote_tier_wants_a_secret_that_others_can_have():
    for url in ("valkey://h", "mem:// | s3://b"):
        with pytest.raises(ConfigError, match="no secret is given.*KVENGINE_SECRET to 64 hex"):
            parse_url(url)
    assert parse_url("file:///kv | valkey://h").secret is None  # kept in the directory


def test_passwords_are_never_shown():
    url = "valkey://me:Geheim@h"
    options = {"secret": HEX, "objects.url": "s3://b", "objects.secret_key": "Geheim"}
    config, _ = Config.load(url, options=options, environ={})
    shown = config.shown()
    assert shown["valkey.password"] == shown["objects.secret_key"] == "hidden"
    assert shown["valkey.user"] == "me"
    assert config.valkey.password == b"Geheim"
    for text in (repr(config), str(shown)):
        assert "Geheim" not in text
    wrong = (
        "valkey://me:Geheim@h:port",
        "valkey://me:Geheim@h?ttl=1 | mem://",
        "valkey://me:Geheim@h#x",
        "valkey://me:Ge/heim@h",
        "valkey://:Geheim@h | file:///a",
        "s3://id:Geheim@bucket",
    )
    for url in wrong:
        with pytest.raises(ConfigError) as caught:
            Config.load(url, options={"secret": HEX}, environ={})
        assert "heim" not in str(caught.value), url
        assert caught.value.__cause__ is None
    with pytest.raises(ConfigError, match="a value that is not shown, expected a password"):
        Config.load(options={"valkey.host": "h", "valkey.password": 7}, environ={})


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a", "/a"),
        ("file:///a/../b/", "/b"),
        ("mem://|file:///with%20space%7Cbar%23", "/with space|bar#"),
    ],
)
def test_url_path(url, path):
    assert parse_url(url).disk.path == path


@given(st.text("abc |%#?&=~é+", min_size=1, max_size=8))
def test_any_path_fits_in_a_url(name):
    from urllib.parse import quote

    assert parse_url(f"mem:// | file:///kv/{quote(name)}").disk.path == f"/kv/{name}"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("unix://", "names no socket; expected an absolute path"),
        ("unix:///kv.sock | mem://", "unix:// stands alone"),
        ("mem:// | unix:///kv.sock", "unix:// stands alone"),
        ("memory://", "unknown URL scheme 'memory'.*did you mean 'mem'.*known are mem, file"),
        ("kdb://localhost", "unknown URL scheme 'kdb': .*known are mem, file, unix, valkey"),
        ("/var/cache", "'/var/cache' has no scheme; expected 'mem://"),
        ("", "'' has no scheme"),
        ("mem:// |", "'' has no scheme"),
        ("mem://?sise=4G", "unknown key 'sise' of mem:// in the URL: did you mean 'size'"),
        ("mem://?size", "expected 'mem://"),
        ("mem://?size=", "memory_bytes.*given ''"),
        ("mem://?size=4G&size=5G", "gives size twice"),
        ("mem://host?size=4G", "memory has no place"),
        ("mem://?size=big", "given 'big', expected a size of at least 64K, such as 512M"),
        ("mem://?size=1K", "given '1K', expected a size of at least 64K"),
        ("mem://?secret=12", "unknown key 'secret'"),
        ("file://var/cache", "three slashes"),
        ("file:///", "names no directory"),
        ("file:///a#b", "'#'.*%23"),
        ("file:///a?durable=maybe", "disk.durable.*expected 1, 0, true or false"),
        ("file:///a?size=1M&segment=2M", "disk.segment_bytes is 2097152, more than disk.size_by"),
        ("file:///a | mem://", "mem:// stands first"),
        ("mem:// | mem://", "each tier once"),
        ("valkey://h | file:///a", "mem:// stands first, then file://, valkey:// and s3://"),
        ("valkey://h | redis://i", "each tier once"),
        ("s3://b | gs://c", "each tier once"),
        ("s3://b | valkey://c", "each tier once"),
        ("valkey://", "names no server; expected valkey://host:6379"),
        ("valkey://:secret@", r"'valkey://:\*\*\*@' names no server"),
        ("valkey://h:port", "names no server"),
        ("valkey://h:0", "valkey.port .url.: given 0, expected a port from 1 to 65535"),
        ("valkey://h:70000", "names no server"),
        ("valkey://a,b", "names no server"),
        ("valkey://h/one", "valkey.db .url.: given 'one', expected a number from 0 to 9999"),
        ("valkey://h/3?cluster=1", "valkey.db is 3: a cluster has database 0 only"),
        ("valkey://h?prefix=a b", "valkey.prefix .*given 'a b', expected up to 256 printable"),
        ("valkey://h?ttl_s=-1", "valkey.ttl_s .*expected a number of seconds, 0 for ever"),
        ("valkey://h?password=x", "unknown key 'password' of valkey://"),
        ("valkey://u:pw@h?x=1", "unknown key 'x'"),
        ("s3://", "names no bucket; expected s3://bucket/prefix"),
        ("s3://id:key@bucket", r"'s3://id:\*\*\*@bucket' names no bucket"),
        (
            "s3://b?endpoint=host",
            "objects.endpoint .*expected an address such as https://host:9000",
        ),
        ("file:///a | file:///b", "each tier once"),
    ],
)
def test_wrong_urls(url, says):
    with pytest.raises(ConfigError, match=says):
        parse_url(url)


def test_each_source_overrides_the_next(tmp_path):
    file = tmp_path / "kvengine.toml"
    file.write_text('memory_bytes = "1M"\nthreads = 3\nlease_s = 5\n[disk]\npath = "/from-file"\n')
    environ = {
        "KVENGINE_CONFIG": str(file),
        "KVENGINE_URL": "mem://?size=2M&threads=4&io_threads=4",
        "KVENGINE_MEMORY_BYTES": "3M",
        "KVENGINE_IO_THREADS": "5",
        "KVENGINE_POLICY": "",
        "PATH": "/bin",
    }
    config, origins = Config.load(environ=environ)
    assert (config.memory_bytes, config.threads, config.io_threads) == (3 << 20, 4, 5)
    assert config.disk.path == "/from-file"
    assert origins["memory_bytes"] == "env KVENGINE_MEMORY_BYTES"
    assert origins["threads"] == "env KVENGINE_URL"
    assert origins["lease_s"] == f"file {file}"
    assert origins["policy"] == "default"

    options = {"threads": 7, "memory_bytes": None}
    config, origins = Config.load("mem://?size=4M&threads=6", options=options, environ=environ)
    assert (config.memory_bytes, config.threads) == (4 << 20, 7)
    assert (origins["memory_bytes"], origins["threads"]) == ("url", "option")


def test_every_setting_can_come_from_the_environment():
    environ = {
        "KVENGINE_MEMORY_BYTES": "2G",
        "KVENGINE_LOSSLESS": "0",
        "KVENGINE_PIN": "1",
        "KVENGINE_POPULATE": "0",
        "KVENGINE_DISK_PATH": "/kv",
        "KVENGINE_DISK_SIZE_BYTES": "3G",
        "KVENGINE_DISK_SEGMENT_BYTES": "1G",
        "KVENGINE_DISK_DURABLE": "false",
        "KVENGINE_DISK_ENCRYPT": "1",
        "KVENGINE_VALKEY_ENCRYPT": "true",
        "KVENGINE_OBJECTS_ENCRYPT": "1",
        "KVENGINE_DISK_CLEAN_LOW": "0.125",
        "KVENGINE_DISK_CLEAN_HIGH": "0.5",
        "KVENGINE_THREADS": "1",
        "KVENGINE_IO_THREADS": "3",
        "KVENGINE_SECRET": HEX,
        "KVENGINE_LEASE_S": "1.5",
        "KVENGINE_RESERVATION_S": "2",
        "KVENGINE_FIND_S": "0.5",
        "KVENGINE_FETCH_S": "3",
        "KVENGINE_POLICY": "lru",
        "KVENGINE_SHADOW": "arc,s3fifo",
        "KVENGINE_RECORD": "/trace.jsonl",
        "KVENGINE_VALKEY_HOST": "h",
        "KVENGINE_VALKEY_PORT": "7000",
        "KVENGINE_VALKEY_DB": "0",
        "KVENGINE_VALKEY_USER": "u",
        "KVENGINE_VALKEY_PASSWORD": "p",
        "KVENGINE_VALKEY_TLS": "1",
        "KVENGINE_VALKEY_CLUSTER": "1",
        "KVENGINE_VALKEY_PREFIX": "kv:",
        "KVENGINE_VALKEY_TTL_S": "9",
        "KVENGINE_VALKEY_TIMEOUT_S": "3",
        "KVENGINE_VALKEY_CONNECTIONS": "3",
        "KVENGINE_OBJECTS_URL": "s3://b",
        "KVENGINE_OBJECTS_ENDPOINT": "https://e",
        "KVENGINE_OBJECTS_REGION": "r",
        "KVENGINE_OBJECTS_KEY_ID": "k",
        "KVENGINE_OBJECTS_SECRET_KEY": "s",
        "KVENGINE_OBJECTS_TIMEOUT_S": "4",
        "KVENGINE_OBJECTS_CONNECTIONS": "5",
    }
    daemon = {
        "KVENGINE_DAEMON_SOCKET": "/run/kv.sock",
        "KVENGINE_DAEMON_TENANT": "t",
        "KVENGINE_DAEMON_KEY": "ab" * 32,
        "KVENGINE_DAEMON_TIMEOUT_S": "2",
    }
    assert set(environ) | set(daemon) == set(ENVIRONMENT_OF.values())
    config, origins = Config.load(environ=environ)
    assert {name for name, origin in origins.items() if origin == "default"} == {
        name for name in origins if name.startswith("daemon.")
    }
    origins = {name: origin for name, origin in origins.items() if origin != "default"}
    assert set(origins.values()) == {f"env {name}" for name in environ}
    assert config == Config(
        memory_bytes=2 * G,
        lossless=False,
        pin=True,
        disk=Disk(
            path="/kv",
            size_bytes=3 * G,
            segment_bytes=G,
            clean_low=0.125,
            clean_high=0.5,
            encrypt=True,
        ),
        populate=False,
        threads=1,
        io_threads=3,
        secret=Secret.fromhex(HEX),
        lease_s=1.5,
        reservation_s=2.0,
        find_s=0.5,
        fetch_s=3.0,
        shadow=("arc", "s3fifo"),
        record="/trace.jsonl",
        valkey=Valkey(
            host="h",
            port=7000,
            user="u",
            password=Secret(b"p"),
            tls=True,
            cluster=True,
            prefix="kv:",
            ttl_s=9.0,
            timeout_s=3.0,
            connections=3,
            encrypt=True,
        ),
        objects=Objects(
            url="s3://b",
            endpoint="https://e",
            region="r",
            key_id="k",
            secret_key=Secret(b"s"),
            timeout_s=4.0,
            connections=5,
            encrypt=True,
        ),
    )


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"KVENGINE_THREDS": "2"}, "variable KVENGINE_THREDS: did you mean 'KVENGINE_THREADS'"),
        ({"KVENGINE_THREADS": "two"}, "threads .env KVENGINE_THREADS.: given 'two', expected a nu"),
        ({"KVENGINE_THREADS": "0"}, "from 1 to 256"),
        ({"KVENGINE_LEASE_S": "nan"}, "lease_s.*given 'nan', expected a number of seconds"),
        ({"KVENGINE_LEASE_S": "-1"}, "given '-1'"),
        ({"KVENGINE_POLICY": "arcs"}, "given 'arcs', did you mean 'arc'. expected one of"),
        ({"KVENGINE_DISK_SIZE_BYTES": "1G"}, "disk.path is not: name the directory, as KVENGINE_D"),
        (
            {"KVENGINE_VALKEY_TTL_S": "9"},
            "valkey.host is not: name the server, as KVENGINE_VALKEY_H",
        ),
        ({"KVENGINE_OBJECTS_REGION": "r"}, "objects.url is not: name the bucket, as KVENGINE_OBJ"),
        ({"KVENGINE_OBJECTS_URL": "b"}, "objects.url.*given 'b', expected s3://bucket/prefix, gs:"),
        ({"KVENGINE_CONFIG": "/nowhere.toml"}, "file /nowhere.toml: cannot be read: No such file"),
    ],
)
def test_wrong_environment(environ, says):
    with pytest.raises(ConfigError, match=says):
        Config.load(environ=environ)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory_byte = 1", "unknown setting 'memory_byte' .file .*did you mean 'memory_bytes'"),
        (
            '[disk]\npath = "/a"\nsize = 1',
            "unknown setting 'disk.size'.*did you mean 'disk.size_by",
        ),
        ("[disc]\n[disk]", None),
        ("[disc]\npath = 1", "unknown setting 'disc.path'.*did you mean 'disk.path'"),
        ("disk = 1", "unknown setting 'disk'"),
        ("memory_bytes = 1.5", "given 1.5, expected a size"),
        ("memory_bytes = true", "given True, expected a size"),
        ("memory_bytes = [1]", r"given \[1\], expected a size"),
        ("threads = 2.0", "given 2.0, expected a number of threads"),
        ("lease_s = true", "given True, expected a number of seconds"),
        ("[disk]\npath = 3", "given 3, expected the path of a directory"),
        ('[disk]\npath = "/"', "expected the path of a directory"),
        ("memory_bytes =", "not TOML"),
    ],
)
def test_wrong_files(tmp_path, text, says):
    file = tmp_path / "kvengine.toml"
    file.write_text(text)
    if says is None:
        assert Config.load(file=file, environ={})[0] == Config()
        return
    with pytest.raises(ConfigError, match=says):
        Config.load(file=file, environ={})


def test_a_config_made_by_hand_is_checked_too():
    assert Config(memory_bytes="4G", disk=Disk(path="kv", size_bytes="8G")).memory_bytes == 4 * G
    assert Path(Disk(path="kv").path).is_absolute()
    with pytest.raises(ConfigError, match=r"threads \(Config\): given '2x'"):
        Config(threads="2x")
    with pytest.raises(ConfigError, match=r"disk: given '/kv', expected a Disk"):
        Config(disk="/kv")
    with pytest.raises(AttributeError):
        Config().threads = 3


def test_a_small_disk_gets_small_segments():
    assert Disk(path="/kv").segment_bytes == 256 << 20
    assert Disk(path="/kv", size_bytes="64M").segment_bytes == 8 << 20
    assert Disk(path="/kv", size_bytes="64K").segment_bytes == 64 << 10
    assert Disk(path="/kv", size_bytes="512G").segment_bytes == 512 << 20
    assert Disk(path="/kv", size_bytes="8T").segment_bytes == 1 << 30


def test_secret_is_read_from_hex_and_from_files(tmp_path):
    raw = bytes.fromhex(HEX)
    for name, content in {"raw": raw, "hex": HEX.encode() + b"\n"}.items():
        (tmp_path / name).write_bytes(content)
        assert Config(secret=str(tmp_path / name)).secret == raw
    assert Config(secret=HEX).secret == Config(secret=raw).secret == raw


def test_secret_is_never_shown(tmp_path):
    config = Config(secret=HEX, disk=Disk(path="/kv"))
    shown = config.shown()
    assert shown["secret"] == "hidden"
    assert shown["disk.path"] == "/kv"
    secret = config.secret
    for text in (repr(config), str(config), str(shown), f"{secret}", "%s" % secret):  # noqa: UP031
        assert "hidden" in text
        assert HEX[:8] not in text
        assert "\\x11" not in text
    assert Config().shown()["secret"] is None


@pytest.mark.parametrize(
    "secret", [HEX[:-2], HEX + "00", HEX[:-1], "/nowhere/Geheim", b"Geheim", 7]
)
def test_a_wrong_secret_is_not_in_the_error(secret):
    with pytest.raises(ConfigError, match="a value that is not shown, expected 64 hex") as caught:
        Config.load(options={"secret": secret}, environ={})
    assert HEX[:8] not in str(caught.value)
    assert "Geheim" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_variables_of_the_tests_are_let_through():
    assert Config.load(environ={"KVENGINE_REQUIRE_ALL": "1"})[0] == Config()


@given(st.dictionaries(st.sampled_from(sorted(SETTINGS)), st.text(max_size=12)))
def test_any_text_is_a_config_or_a_config_error(options):
    try:
        config, origins = Config.load(options=options, environ={})
    except ConfigError:
        return
    assert isinstance(config, Config)
    assert {name for name, origin in origins.items() if origin == "option"} == set(options)


@given(st.text("mefil:/|?=&size1GMK#[]%", max_size=40))
def test_any_url_is_a_config_or_a_config_error(url):
    try:
        parse_url(url)
    except ConfigError:
        return


def test_a_daemon_is_named_alone():
    config, _ = Config.load("unix:///run/kv.sock?tenant=t&timeout_s=2&threads=3", environ={})
    assert config == Config(
        daemon=Daemon(socket="/run/kv.sock", tenant="t", timeout_s=2), threads=3
    )
    environ = {"KVENGINE_DAEMON_SOCKET": "/run/kv.sock", "KVENGINE_DAEMON_KEY": "5e" * 40}
    config, _ = Config.load(environ=environ)
    assert config.daemon.key == b"\x5e" * 40 and "5e5e" not in str(config.shown())
    with pytest.raises(ConfigError, match="a daemon's socket is given, and tiers as well"):
        Config.load("file:///kv", environ=environ)
