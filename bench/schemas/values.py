"""The values that fields of results files hold, with their limits."""

from __future__ import annotations

from typing import Annotated

from bench.schemas.generator import Must

Text = Annotated[str, Must(minLength=1)]
Digest = Annotated[str, Must(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Must(minimum=0)]
Natural = Annotated[int, Must(minimum=1)]
Amount = Annotated[float, Must(minimum=0)]
Positive = Annotated[float, Must(exclusiveMinimum=0)]
Share = Annotated[float, Must(minimum=0, maximum=1)]
Counts = dict[str, Count]
Amounts = list[Amount]
Samples = Annotated[list[Positive], Must(minItems=1)]
