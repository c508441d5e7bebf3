"""1,000 experiments: seconds and memory to load all definitions, as `dagster dev`'s code server does it.

    python benchmarks/scale.py [N ...]

Each size runs in a process of its own. `load` builds definitions and repository; `snapshot` is what the web server asks for.
Targets (DESIGN.md, section 10): 1,000 experiments in ≤ 10 s and ≤ 300 MB.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(n: int) -> dict[str, float]:
    begun = time.process_time()
    from dagster._core.remote_representation.external_data import RepositorySnap

    from mlchaos_dagster.catalog import Catalog
    from mlchaos_dagster.domain.spec import Suite
    from mlchaos_dagster.orchestration.definitions import Library, build_definitions
    from mlchaos_dagster.orchestration.platform import RealPlatform
    from mlchaos_dagster.settings import Home, Settings

    imported = time.process_time()
    catalog = Catalog()
    environment, one = catalog.environment("sandbox"), catalog.experiments()[0]
    experiments = tuple(one.model_copy(update={"name": f"experiment-{i}", "area": f"area-{i % 20}"}) for i in range(n))
    suites = tuple(
        Suite.model_validate(
            {
                "schema": "mlchaos/v1",
                "name": f"suite-{k}",
                "title": "t",
                "experiments": [e.name for e in experiments[k::5]],
            }
        )
        for k in range(5)
    )
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(Home(Path(home)), "sandbox", (), False, "")
        start = time.process_time()
        definitions = build_definitions(Library((environment,), experiments, suites), RealPlatform(settings))
        repository = definitions.get_repository_def()
        repository.load_all_definitions()
        loaded = time.process_time()
        RepositorySnap.from_def(repository)
        done = time.process_time()
    return {
        "experiments": n,
        "import_s": round(imported - begun, 2),
        "load_s": round(loaded - start, 2),
        "snapshot_s": round(done - loaded, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]))))
        return
    for n in [int(a) for a in sys.argv[1:]] or [10, 100, 1000]:
        done = subprocess.run([sys.executable, __file__, "--one", str(n)], capture_output=True, text=True, check=True)
        print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
