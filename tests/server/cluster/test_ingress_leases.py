"""The web processes of a cluster as one, for the GPU worker of a replica."""

from server.cluster.ingress_leases import IngressLeases
from shared.protocol import CacheCounts, Ping


def test_the_sums_of_caches() -> None:
    """Those of the catalogue, too: a replica that reads it for a report answers no request by it."""
    leases = IngressLeases()
    web = leases.as_web_process()
    web.count_catalog(hit=False)
    assert web.ping().caches == {"catalog": CacheCounts(misses=1)}
    for name in ("one", "two"):
        counts = {"catalog": CacheCounts(hits=3, misses=1), "pronunciations": CacheCounts(hits=2)}
        leases.renew(name, Ping(caches=counts))
    sums = {"catalog": CacheCounts(hits=6, misses=2), "pronunciations": CacheCounts(hits=4)}
    assert web.ping().caches == sums
