"""What may go wrong and is the caller's to know.

    KVEngineError
    ├── ConfigError        a setting, URL, file or environment variable that does not fit
    ├── LayoutError        an array, block table or layout that does not fit the namespace
    ├── BadKey             a key or token sequence of the wrong form
    ├── FrameError         bytes that are not a whole, untouched frame
    │   ├── FrameExpired   a frame that has outlived its time to live
    │   └── UnknownKey     a sealed frame whose data key is not held
    ├── DirectoryInUse     another process holds the directory
    ├── TraceError         a trace file that cannot be read or replayed: the line, what was expected
    ├── ModelNotSupported  a model or cache that an adapter cannot map
    ├── AwayError          the daemon of this host does not answer, or refuses this client
    └── ClosedError        a verb on a closed engine

A miss, a refusal or a fault of a tier is never raised: it is a return value and a metric.
"""


class KVEngineError(Exception):
    """Anything that this package raises on purpose."""


class ConfigError(KVEngineError, ValueError):
    """A setting that does not fit: says where it came from, what was expected, what to do."""


class LayoutError(KVEngineError, ValueError):
    """An array, block table or layout that does not fit its namespace."""


class BadKey(KVEngineError, ValueError):
    """A key of the wrong length, or tokens that cannot be hashed."""


class FrameError(KVEngineError, ValueError):
    """Bytes that are not a whole, untouched frame. Inside the engine: a counted miss."""


class FrameExpired(FrameError):
    """A whole frame that has outlived its time to live. Inside the engine: a miss."""


class UnknownKey(FrameError):
    """A sealed frame whose data key was dropped, or is another's. Inside the engine: a miss."""


class DirectoryInUse(KVEngineError, OSError):
    """A directory whose lock another process (or engine) holds."""


class TraceError(KVEngineError, ValueError):
    """A trace that cannot be read or replayed: says the line and what was expected there."""


class ModelNotSupported(KVEngineError, ValueError):
    """A model or cache whose attention state an adapter cannot map to blocks."""


class AwayError(KVEngineError, ConnectionError):
    """No daemon answers at a socket, or it refuses this client. Later on that is a miss."""


class ClosedError(KVEngineError, RuntimeError):
    """A verb on an engine that has been closed."""
