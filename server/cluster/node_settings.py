"""The settings on their way to the nodes of a cluster.

Ray keeps the arguments of a deployment, shows them and may log them. So the arguments have all settings but the secret
ones, and name those: each node has keys and token in its own environment, or in the file TTS_KEYS_FILE.
"""

import os
from pathlib import Path

import msgspec

from shared.settings import SECRET, Settings, SettingsError, load_settings, variable_of, variables_of


class NodeSettings(msgspec.Struct, frozen=True):
    """A deployment's argument: TTS_* variables, and the names of those that each node must have itself."""

    variables: dict[str, str]
    secret: list[str]


def settings_for_nodes(settings: Settings) -> NodeSettings:
    """The settings without secrets. Paths are those of this process's folder: on each node they must be the same."""
    values = msgspec.structs.asdict(settings)
    paths = {name: value.absolute() for name, value in values.items() if isinstance(value, Path)}
    model_paths = {name: path.absolute() for name, path in settings.model_paths.items()}
    variables = variables_of(msgspec.structs.replace(settings, **paths, model_paths=model_paths))
    secret = sorted(variable_of(name) for name in SECRET if variable_of(name) in variables)
    return NodeSettings({name: value for name, value in variables.items() if name not in secret}, secret)


def settings_on_node(node: NodeSettings) -> Settings:
    """The settings on this node, with its secrets; SettingsError if one is missing."""
    missing = [name for name in node.secret if not os.environ.get(name)]
    if missing:
        reason = "is set where the application was deployed, but not in the environment of Ray on this node"
        raise SettingsError([f"{name}: {reason}" for name in missing])
    return load_settings(node.variables | {name: os.environ[name] for name in node.secret})
