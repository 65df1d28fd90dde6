"""Every error the product raises on purpose.

InpaintError
├── InputError                 the user's: manifest, parameters, settings, files
│   ├── SettingsError
│   ├── ManifestError
│   ├── ParameterError
│   │   ├── TextDoesNotFit
│   │   ├── TextGlyphMissing   the font has no glyph for a character
│   │   └── TextLayoutMissing  the worker cannot shape this script
│   ├── LocationError          a path or URI outside the allowed roots, buckets and schemes
│   ├── ObjectMissing
│   ├── ObjectDenied
│   ├── ObjectTooLarge
│   ├── OutputReplaced         a later submission took this output over
│   ├── PluginMissing          the job names a plugin that the worker has not installed
│   ├── ImageError             bytes that are not a usable image
│   │   ├── ImageTruncated
│   │   └── FontError
│   └── MaskError
│       └── MaskSizeError      mask and image differ in size
├── UnavailableError           a service does not answer; a retry can help
│   ├── StorageUnavailable
│   ├── OutputRefused          the disk is full, or the worker may not write there
│   ├── DatabaseUnavailable
│   └── BrokerUnavailable
├── EngineError                the model or the device
│   ├── EngineUnavailable      cannot be loaded; the worker has taken no job
│   ├── DeviceLost             unusable until the process restarts
│   └── OutOfMemory            the device's memory is full
├── HostOutOfMemory            the machine's memory is full
├── WorkerLost                 the lease expired: the worker crashed or was cut off
├── PostprocessError           a plugin failed, which says nothing about the device
├── GateError                  the result is not good enough to publish
│   ├── GateNotFinite          NaN or infinite values
│   ├── GateBlack
│   ├── GateUnchanged
│   ├── GateSeam
│   └── GateColour
├── OutputConflict             another writer changed the output after the job started
├── FidelityError              a pixel outside the feather would have changed
└── Interrupted                not a failure: the job stops at its next step
    ├── LeaseLost
    ├── Cancelled
    └── Released

``code`` is stable: it is stored with the attempt, filtered on, and documented.
``retryable`` says whether the same job may succeed later without anybody changing anything.
"""

from __future__ import annotations


class InpaintError(Exception):
    """Root of the tree; ``str()`` is one line that names the value and the remedy."""

    code = "internal_error"
    retryable = False

    def __init__(self, message: str) -> None:
        super().__init__(message)


class InputError(InpaintError):
    code = "bad_input"


class SettingsError(InputError):
    code = "bad_settings"


class ManifestError(InputError):
    code = "bad_manifest"


class ParameterError(InputError):
    code = "bad_parameter"


class TextDoesNotFit(ParameterError):
    code = "text_does_not_fit"


class TextGlyphMissing(ParameterError):
    code = "text_glyph_missing"


class TextLayoutMissing(ParameterError):
    code = "text_layout_missing"


class LocationError(InputError):
    code = "location_refused"


class ObjectMissing(InputError):
    code = "object_missing"


# Not retryable, though a permission can be granted later: only a person can do that.
class ObjectDenied(InputError):
    code = "object_denied"


class ObjectTooLarge(InputError):
    code = "object_too_large"


class OutputReplaced(InputError):
    code = "output_replaced"


class PluginMissing(InputError):
    code = "postprocess_missing"


class ImageError(InputError):
    code = "bad_image"


class ImageTruncated(ImageError):
    code = "image_truncated"


class FontError(ImageError):
    code = "bad_font"


class MaskError(InputError):
    code = "bad_mask"


class MaskSizeError(MaskError):
    code = "mask_size"


class UnavailableError(InpaintError):
    code = "unavailable"
    retryable = True


class StorageUnavailable(UnavailableError):
    code = "storage_unavailable"


class OutputRefused(UnavailableError):
    code = "output_refused"


class DatabaseUnavailable(UnavailableError):
    code = "database_unavailable"


class BrokerUnavailable(UnavailableError):
    code = "broker_unavailable"


# Retryable: torch and OpenCV raise for transient states of the device as well.
class EngineError(InpaintError):
    code = "engine_error"
    retryable = True


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
    retryable = False


class DeviceLost(EngineError):
    code = "device_lost"


class OutOfMemory(EngineError):
    code = "out_of_memory"


class HostOutOfMemory(InpaintError):
    code = "host_out_of_memory"
    retryable = True


class WorkerLost(InpaintError):
    code = "worker_lost"
    retryable = True


# Not an EngineError: five of those in a row take the device out of service.
class PostprocessError(InpaintError):
    code = "postprocess_failed"
    retryable = True


# Not retryable: the same seed gives the same result.
class GateError(InpaintError):
    code = "gate_failed"


class GateNotFinite(GateError):
    code = "gate_not_finite"


class GateBlack(GateError):
    code = "gate_black"


class GateUnchanged(GateError):
    code = "gate_unchanged"


class GateSeam(GateError):
    code = "gate_seam"


class GateColour(GateError):
    code = "gate_colour"


class OutputConflict(InpaintError):
    code = "output_conflict"
    retryable = True


class FidelityError(InpaintError):
    code = "fidelity_violated"


class Interrupted(InpaintError):
    code = "interrupted"
    retryable = True


class LeaseLost(Interrupted):
    code = "lease_lost"


class Cancelled(Interrupted):
    code = "cancelled"


class Released(Interrupted):
    code = "released"


def one_line(error: BaseException, *, max_chars: int = 200) -> str:
    """Return an error's message on one line and cut off; its class's name if it has no message."""
    return " ".join(str(error).split())[:max_chars] or type(error).__name__
