"""The embedded default engine: espeak-ng. Real speech on any CPU, nothing to download.

espeak-ng is an optional extra (GPL-3): `engines.factory` imports this package only if the extra is installed.
"""

from gpu_worker.engines.espeak.engine import EspeakEngine as EspeakEngine
