"""What NVIDIA's management library tells of links, from a stand-in that answers as the library does."""

import pytest

from tokenferry.gpu_links import Links, ManagementLibrary


class Library:
    """The library on a machine with one GPU, of `num_links` NVLinks that are up."""

    def __init__(self, num_links: int = 18, remote: int = 2, init: int = 0, version: int = 6) -> None:
        self.num_links, self.remote, self.init, self.version, self.shut_down = num_links, remote, init, version, 0

    def nvmlInit_v2(self):
        return self.init

    def nvmlShutdown(self):
        self.shut_down += 1

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.95.05"
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetNvLinkState(self, device, link, answer):
        answer._obj.value = int(link.value < self.num_links)
        return 0 if link.value < 18 else 2

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, device, link, answer):
        answer._obj.value = self.remote
        return 0

    def nvmlDeviceGetNvLinkVersion(self, device, link, answer):
        answer._obj.value = self.version
        return 0


@pytest.mark.parametrize(
    ("library", "links", "said"),
    [
        (Library(), Links(num_active=18, version=4, to_switch=True), "18 x NVLink 4, NVSwitch"),
        (Library(12, remote=0), Links(num_active=12, version=4, to_switch=False), "12 x NVLink 4"),
        (Library(8, remote=0, version=3), Links(num_active=8, version=2, to_switch=False), "8 x NVLink 2"),
        (Library(18, version=40), Links(num_active=18, version=0, to_switch=True), "18 x NVLink, NVSwitch"),
        (Library(0), Links(num_active=0, version=0, to_switch=False), "no NVLink"),
    ],
    ids=["switch", "direct", "second-generation", "newer-than-known", "none"],
)
def test_links_of_a_gpu(library, links, said):
    with ManagementLibrary(library) as opened:
        found = opened.links("GPU-1")
        assert opened.driver_version() == "580.95.05"
    assert (found, str(found)) == (links, said)
    assert library.shut_down == 1


def test_a_gpu_that_the_library_does_not_know_has_unknown_links():
    with ManagementLibrary(Library()) as opened:
        assert opened.links("GPU-2") is None


def test_an_older_library_that_lacks_a_question_answers_none():
    library = Library()
    library.nvmlDeviceGetHandleByUUID = None
    with ManagementLibrary(library) as opened:
        assert opened.links("GPU-1") is None


def test_a_driver_that_does_not_run_answers_none():
    with ManagementLibrary(Library(init=9)) as opened:
        assert (opened.driver_version(), opened.links("GPU-1")) == (None, None)
