"""A transport whose inside a test can exchange amid a step, so that nothing of the library has to be patched."""

from dataclasses import dataclass

import tokenferry as tf
from tokenferry.transports.base import StepTensors, Transport, TransportSettings
from tokenferry.transports.opening import open_transport
from tokenferry.transports.wrapper import TransportWrapper


class Exchangeable(TransportWrapper):
    """`inner` may become anything that has a transport's methods."""


@dataclass(frozen=True)
class Opens:
    """For `Workspace(transport=...)`: the library's transport of this name within an `Exchangeable`."""

    name: str

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        return Exchangeable(open_transport(self.name, settings, step_tensors))


def exchangeable(ws: tf.Workspace) -> Exchangeable:
    """That of a workspace which was opened with `Opens`; in debug mode it stands within the one that checks."""
    transport = ws.active_transport
    while not isinstance(transport, Exchangeable):
        transport = transport.inner
    return transport
