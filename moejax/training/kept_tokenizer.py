"""The tokenizer of a run: a copy that it keeps, whatever becomes of the file it was taken from.

A tokenizer that is learned again from changed text, or read again from a changed file, would not
fit the run's weights.
"""

import logging
from pathlib import Path

from moejax.config import Config, ConfigError
from moejax.data import Tokenizer, load_tokenizer
from moejax.data.tokenizers import check_rows, open_tokenizer
from moejax.data.tokenizers.ids import IdTokenizer
from moejax.training.forking.source import find_source

log = logging.getLogger("moejax")


def kept_tokenizer(workdir: Path, config: Config) -> Tokenizer | None:
    """Returns the tokenizer of a run; None if it is one that nothing is kept of yet.

    Args:
      workdir: the run directory; nothing needs to be there.
      config: of the run.

    Raises:
      ConfigError: the file of `data.tokenizer` is not what it was, or has more ids than the
        embedding has rows.
      DataError: the copy, or that file, is missing or damaged.
    """
    begun_in = _where_begun(workdir, config)
    copy = load_tokenizer(begun_in) if begun_in else None
    if not config.data.has_tokenizer_file or isinstance(copy, IdTokenizer):
        return copy
    file = config.data.tokenizer
    if copy is not None and not Path(file).exists():
        log.info("data.tokenizer=%s is gone: the run goes on with its copy", file)
        return copy
    tokenizer = open_tokenizer(file, "data.tokenizer")
    check_rows(tokenizer, config.vocab_size, f"data.tokenizer={file}")
    if copy is not None and copy.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer={file} is not the tokenizer that {begun_in} was begun with: it, or a "
            "file beside it, has changed; restore it, or choose another --workdir"
        )
    return tokenizer


def _where_begun(workdir: Path, config: Config) -> Path | None:
    """Returns the folder with the tokenizer of a run: its own, or that of its source.

    A fork whose recipe asks for one of another kind or size has its own; it cannot take the
    source's embedding.
    """
    if (workdir / "tokenizer.json").exists():
        return workdir
    if not config.init.source:
        return None
    source = find_source(config.init, workdir)
    data, theirs = config.data, source.config.data
    is_alike = (data.tokenizer, data.vocab_size) == (theirs.tokenizer, theirs.vocab_size)
    return source.workdir if is_alike or data.has_tokenizer_file else None
