"""`python -m sps2_service.model_hash FOLDER`: the hash of a model, for routers that have its folder without weights."""

import sys

from sps2_service.model_folder import ModelFolder, ModelFolderError


def main() -> int:
    """Prints the hash; exit code 1 and one line for a folder that cannot be served."""
    (folder,) = sys.argv[1:]
    try:
        sys.stdout.write(ModelFolder(folder).model_hash + "\n")
    except ModelFolderError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
