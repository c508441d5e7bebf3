"""What looks like a secret's name, and how a secret is written in a file: as a reference, never as itself."""

from __future__ import annotations

import re

SECRET_KEY = re.compile(r"authorization|token|passw|secret|api[-_]?key|apikey|credential|cookie", re.IGNORECASE)
REFERENCE = re.compile(r"^(env|file):")
