"""`python -m compiler` installs the compiler, or says that it is there."""

from .errors import CompilerError
from .toolchain import Toolchain

try:
    print(f"The compiler is in {Toolchain.install().folder}.")
except CompilerError as error:
    raise SystemExit(str(error)) from None
