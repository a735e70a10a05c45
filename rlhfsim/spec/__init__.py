"""YAML files in, validated records out."""
