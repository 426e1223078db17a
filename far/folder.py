"""A model's folder: ``config.json``, and safetensors of a generator, an autoencoder or both.

No other module reads or writes ``config.json``. Opening a folder needs no torch.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from far.autoencoder_config import DecoderName
from far.card import model_card, write_card
from far.config import from_dict
from far.devices import resolve_device
from far.diffusers_config import PREFIX, DiffusersConfig
from far.errors import InputError, prefix_errors
from far.files import read_json, sole_use, write_json
from far.folder_config import Base, FolderConfig
from far.hub import upload
from far.names import BUNDLED, bundled_names, find_folder
from far.precision import resolve_dtype, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from far.model import FAR
    from far.tokenizer import Tokenizer

_CONFIG = "config.json"
_MODEL, _AUTOENCODER = "model.safetensors", "autoencoder.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A folder with a model, whose ``config.json`` has been read and checked.

    Attributes:
        path: the folder.
        config: the content of its ``config.json``.
        base: the folder of the bundled model that it takes tensors from, if any.
        local_files_only: read an autoencoder of the hub from the local cache alone.
    """

    path: Path
    config: FolderConfig
    base: "ModelFolder | None" = None
    local_files_only: bool = False

    @classmethod
    def open(
        cls, name: Path | str, *, revision: str | None = None, local_files_only: bool = False
    ) -> "ModelFolder":
        """Find a folder and read its ``config.json``. The parameters are those of :func:`far.load`.

        Raises:
            InputError: the model does not exist, or its ``config.json`` is damaged or describes no model.
        """
        path = find_folder(name, revision=revision, local_files_only=local_files_only)
        config = _read_config(path / _CONFIG)
        with prefix_errors(f"{path / _CONFIG}: "):
            base = None if config.base is None else _open_base(config.base.weights)
        return cls(path, config, base, local_files_only)

    @property
    def has_autoencoder(self) -> bool:
        """Return whether the folder or its base holds an autoencoder, or names one of diffusers."""
        return self.config.autoencoder is not None or (self.base is not None and self.base.has_autoencoder)

    def load_model(self) -> "FAR":
        """Load the generator, in float32 on the CPU, in evaluation mode.

        Raises:
            InputError: the folder has no generator, or its files are damaged or do not fit together.
        """
        from far.model import FAR
        from far.weights import build_module

        config = self.config.model
        if config is None:
            raise InputError(f"{self.path / _CONFIG} has no model. Use far.load_autoencoder instead")
        fallback = None if self.base is None else lambda: self._base_tensors(_MODEL)
        return build_module(lambda: FAR(config), self._tensors(_MODEL), self.path / _MODEL, fallback).eval()

    def load_autoencoder(self) -> "Tokenizer":
        """Load the autoencoder of the folder or of its base, in float32 on the CPU, in evaluation mode.

        One of diffusers is read from where the training read it, unless the folder holds a copy.

        Raises:
            InputError: there is no autoencoder, its file is damaged or does not fit the configuration, or
                one of diffusers is missing or has changed.
        """
        from far.autoencoder import Autoencoder
        from far.diffusers_files import build_diffusers, reopen_diffusers
        from far.weights import build_module

        owner = self if self.config.autoencoder is not None or self.base is None else self.base
        config = owner.config.autoencoder
        if config is None:
            raise InputError(f"{self.path / _CONFIG} describes no autoencoder. Give a folder that holds one")
        if isinstance(config, DiffusersConfig) and not config.included:
            return reopen_diffusers(config, owner.path / _CONFIG, local_files_only=self.local_files_only)
        tensors = self._tensors(_AUTOENCODER) if owner is self else self._base_tensors(_AUTOENCODER)
        file = owner.path / _AUTOENCODER
        if isinstance(config, DiffusersConfig):
            return build_diffusers(config, tensors, file)
        return build_module(lambda: Autoencoder(config), tensors, file).eval()

    def optional_autoencoder(self, decoder: DecoderName = "full") -> "Tokenizer | None":
        """Load the autoencoder with ``decoder`` selected; None if the model has no autoencoder.

        Raises:
            InputError: as :meth:`load_autoencoder`, or there is no such decoder.
        """
        if not self.has_autoencoder:
            if decoder != "full":
                raise InputError(f"{self.path} has no autoencoder, so no decoder {decoder!r}. Omit it")
            return None
        autoencoder = self.load_autoencoder()
        with prefix_errors(f"{self.path}: "):
            autoencoder.use_decoder(decoder)
        return autoencoder

    def _tensors(self, file: str) -> "dict[str, Tensor]":
        from far.weights import read_tensors

        return read_tensors(self.path / file, self.config.sha256.get(file))

    def _base_tensors(self, file: str) -> "dict[str, Tensor]":
        from far.weights import read_tensors

        assert self.base is not None
        assert self.config.base is not None
        try:
            return read_tensors(self.base.path / file, self.config.base.sha256.get(file, ""))
        except InputError as error:
            raise InputError(
                f"{self.path / _CONFIG}: the base {self.config.base.weights!r} is not the one that this "
                f"model was made from ({error}). Install the version of far that wrote this folder"
            ) from error

    @classmethod
    def save(
        cls,
        path: Path,
        config: FolderConfig,
        *,
        model: "FAR | None" = None,
        autoencoder: "Tokenizer | None" = None,
        dtype: "torch.dtype | str | None" = None,
        base: str | None = None,
    ) -> "ModelFolder":
        """Write a folder: the weights first, then ``config.json``, then the model card of a whole generator.

        Args:
            path: the folder, made if missing.
            config: classes, defaults, results and training. The sizes are taken from the modules.
            model: the generator, if any.
            autoencoder: the autoencoder, if any. The weights of one of diffusers are left out unless its
                configuration includes them.
            dtype: as in :meth:`far.Pipeline.save_pretrained`.
            base: as there.

        Raises:
            InputError: ``dtype`` or ``base`` is not valid, weights are int8, or a file cannot be written.
        """
        from far.packing import has_int8
        from far.weights import save_tensors

        if model is not None and has_int8(model):
            raise InputError(f"{path}: int8 weights cannot be saved. Load the model in another dtype")
        modules = {_MODEL: model, _AUTOENCODER: autoencoder}
        tensors = {file: module.state_dict() for file, module in modules.items() if module is not None}
        described = None if autoencoder is None else autoencoder.config
        if isinstance(described, DiffusersConfig) and not described.included:
            del tensors[_AUTOENCODER]
        sizes = None if model is None else model.config
        config = dataclasses.replace(config, model=sizes, autoencoder=described)
        folder = cls(path, config)
        if base is not None:
            folder, tensors = folder._on_base(base, tensors)
        for file, entries in tensors.items():
            save_tensors(path / file, entries, dtype)
        write_json(path / _CONFIG, folder.config.to_dict())
        if folder.config.model is not None and base is None:
            write_card(path, folder.config)
        return folder

    def _on_base(
        self, name: str, tensors: "dict[str, dict[str, Tensor]]"
    ) -> "tuple[ModelFolder, dict[str, dict[str, Tensor]]]":
        """Return this folder as one that builds on a bundled model, and the tensors that it must hold."""
        from far.weights import changed_tensors, digest

        base = _open_base(name)
        theirs = {file: base._tensors(file) for file in (_MODEL, _AUTOENCODER)}
        described = Base(name, {file: digest(entries) for file, entries in theirs.items()})
        left = {file: changed_tensors(entries, theirs[file]) for file, entries in tensors.items()}
        config = dataclasses.replace(self.config, base=described)
        if left.get(_AUTOENCODER) or config.autoencoder not in (None, base.config.autoencoder):
            left[_AUTOENCODER] = tensors[_AUTOENCODER]  # an autoencoder is written whole
        else:  # it is the base's own
            left.pop(_AUTOENCODER, None)
            config = dataclasses.replace(config, autoencoder=None)
        return ModelFolder(self.path, config, base), left

    def push(self, name: str, *, license: str, **upload_options: Any) -> str:
        """Publish the folder's files and a model card in one commit, and return the repository's address.

        The other parameters are those of :func:`far.hub.upload`.

        Raises:
            InputError: as there, or the autoencoder is in a folder of this machine.
        """
        autoencoder = self.config.autoencoder
        if isinstance(autoencoder, DiffusersConfig) and autoencoder.is_local and not autoencoder.included:
            problem = f"others do not have the autoencoder {autoencoder.source}"
            raise InputError(f"{problem}. Add --include-autoencoder, or train with one of the hub")
        written = [file for file in (_CONFIG, _MODEL, _AUTOENCODER) if (self.path / file).exists()]
        files = {file: self.path / file for file in written}
        card = model_card(self.path, self.config, name, license)
        return upload(files, card, name, other_form="model_index.json", **upload_options)


def _read_config(path: Path) -> FolderConfig:
    values = read_json(path)
    if isinstance(values, dict) and "format" in values:  # a key of version 0.1
        raise InputError(f"{path} is of far 0.1, whose models are no longer read. Train or convert it again")
    if isinstance(values, dict) and "onnx" in values:  # see far.onnx.config
        raise InputError(f"{path} is that of an ONNX export. Load it with far.onnx.load")
    config = from_dict(FolderConfig, values, str(path))
    if config.model is None and config.autoencoder is None:
        raise InputError(f"{path} describes no model. Give a folder that far wrote")
    return config


def _open_base(name: str) -> ModelFolder:
    if name not in bundled_names():
        raise InputError(f"base {name!r} is not a bundled model. Give one of: {', '.join(bundled_names())}")
    folder = ModelFolder.open(BUNDLED / name)
    if folder.base is not None:
        raise InputError(f"base {name!r} builds on {folder.base.path.name!r} itself. Give that one")
    return folder


def load_autoencoder(
    name: Path | str,
    *,
    dtype: "str | torch.dtype" = "float32",
    device: "str | torch.device" = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    decoder: DecoderName = "full",
) -> "Tokenizer":
    """Load an autoencoder, alone or from a whole model's folder, in evaluation mode.

    The parameters are those of :meth:`far.Pipeline.from_pretrained`. The dtype cannot be int8. The name may
    also be ``diffusers:FOLDER`` or ``diffusers:OWNER/NAME[/SUBFOLDER][@REVISION]``: an ``AutoencoderKL`` or
    ``AutoencoderDC`` of diffusers (extra ``diffusers``), as safetensors.

    Raises:
        InputError: the model, device, dtype or decoder does not exist, the model has no autoencoder, or a
            file is damaged.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if dtype == "int8":
        raise InputError("dtype int8 is for generators. Give another dtype for an autoencoder")
    if isinstance(name, str) and name.startswith(PREFIX):
        from far.diffusers_files import open_diffusers

        name = name if revision is None else f"{name}@{revision}"
        autoencoder: Tokenizer = open_diffusers(name, local_files_only=local_files_only)
    else:
        folder = ModelFolder.open(name, revision=revision, local_files_only=local_files_only)
        autoencoder = folder.load_autoencoder()
    with prefix_errors(f"{name}: "):
        autoencoder.use_decoder(decoder)
    return autoencoder.to(device, torch_dtype(dtype))


def save_autoencoder(autoencoder: "Tokenizer", path: Path, results: dict[str, Any] | None = None) -> None:
    """Write an autoencoder alone; ``results`` are figures to keep in ``config.json``."""
    ModelFolder.save(path, FolderConfig(results=results or {}), autoencoder=autoencoder)


def config_without(path: Path, part: Literal["model", "autoencoder"]) -> FolderConfig:
    """Return the content of a ``config.json`` that a part can be added to; an empty one for a new folder.

    Raises:
        InputError: the folder already holds that part, or a ``config.json`` that is not ours.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file. Give a folder")
    config = _read_config(path / _CONFIG) if (path / _CONFIG).exists() else FolderConfig()
    if getattr(config, part) is not None or (path / f"{part}.safetensors").exists():
        raise InputError(f"{path} already holds the part {part!r}. Choose another folder, or remove it")
    return config


def add_part(path: Path, tensors: "dict[str, Tensor]", **entries: Any) -> None:
    """Write a part's tensors, and then ``config.json`` with further ``entries``; if that fails, neither.

    The entries hold ``model`` or ``autoencoder``. The folder is read again under a lock, because another
    command may have added the other part since the caller's check.

    Raises:
        InputError: the folder holds that part, or another one that it does not fit; another command is
            writing to it; or a file cannot be written.
    """
    from far.weights import save_tensors

    part: Literal["model", "autoencoder"] = "model" if "model" in entries else "autoencoder"
    with sole_use(path):
        existing = config_without(path, part)
        try:
            config = dataclasses.replace(existing, **entries)
        except InputError as error:
            raise InputError(f"{path}: {error}, or choose another folder") from error
        weights = path / f"{part}.safetensors"
        save_tensors(weights, tensors)
        try:
            write_json(path / _CONFIG, config.to_dict())
        except BaseException:  # also Ctrl-C: weights without a config would block the next attempt
            weights.unlink()
            raise
