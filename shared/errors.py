"""Every error the product raises on purpose.

InpaintError
├── InputError                 the user's: manifest, parameters, settings, files
│   ├── SettingsError
│   ├── ManifestError
│   ├── ParameterError
│   ├── LocationError          a path or URI that is refused
│   ├── ObjectMissing
│   ├── ObjectDenied
│   ├── ObjectTooLarge
│   ├── OutputReplaced         another job writes there since, as its user asked
│   ├── ImageError             bytes that are not a usable picture
│   └── MaskError
├── UnavailableError           a service does not answer; a retry can help
│   ├── StorageUnavailable
│   ├── OutputRefused          the disk is full, or nobody may write there
│   ├── DatabaseUnavailable
│   └── BrokerUnavailable
├── EngineError                the model or the device
│   ├── EngineUnavailable      cannot be loaded; nothing was taken from the queue
│   └── OutOfMemory
├── PostprocessError           a plugin failed, which says nothing about the device
├── GateError                  a result that is not good enough to publish
├── OutputConflict             somebody else wrote the output meanwhile
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

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InputError(InpaintError):
    code = "bad_input"


class SettingsError(InputError):
    code = "bad_settings"


class ManifestError(InputError):
    code = "bad_manifest"


class ParameterError(InputError):
    code = "bad_parameter"


class LocationError(InputError):
    code = "location_refused"


class ObjectMissing(InputError):
    code = "object_missing"


class ObjectDenied(InputError):
    code = "object_denied"


class ObjectTooLarge(InputError):
    code = "object_too_large"


class OutputReplaced(InputError):
    code = "output_replaced"


class ImageError(InputError):
    code = "bad_image"


class MaskError(InputError):
    code = "bad_mask"


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


class EngineError(InpaintError):
    code = "engine_error"
    retryable = True


class PostprocessError(InpaintError):
    code = "postprocess_failed"
    retryable = True


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
    retryable = False


class OutOfMemory(EngineError):
    code = "out_of_memory"


class GateError(InpaintError):
    """Codes: gate_not_finite, gate_black, gate_unchanged, gate_seam, gate_colour."""

    code = "gate_failed"


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
