"""What the sections of every config file are made of."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors, and numbers are never guessed from strings."""

    input_files: ClassVar[tuple[str, ...]] = ()
    """Keys of a whole config whose values are files that the user has, with * for a name that the
    config chooses. A relative one is looked for from the file that names it, or from the current
    folder where the command line does."""
    absolute_inputs: ClassVar[bool] = False
    """Whether loading makes these paths absolute, so that a copy of the config means the same files
    wherever it lies; else they become relative to the folder of the config that is loaded."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )
