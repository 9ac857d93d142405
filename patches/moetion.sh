# Source this (bash, zsh, dash in its own directory) before starting a training job; it prints
# nothing and can be sourced again. It changes PYTHONPATH and MOETION, nothing else.
if [ -n "${BASH_VERSION:-}" ]; then
    _moetion_file="${BASH_SOURCE[0]}"
elif [ -n "${ZSH_VERSION:-}" ]; then
    eval '_moetion_file="${(%):-%x}"'
else
    _moetion_file="./moetion.sh"
fi
_moetion_startup="$(CDPATH= cd -- "$(dirname -- "$_moetion_file")" && pwd -P)/startup"
case ":${PYTHONPATH:-}:" in
    ":$_moetion_startup:"*) ;;
    *) export PYTHONPATH="$_moetion_startup${PYTHONPATH:+:$PYTHONPATH}" ;;
esac
export MOETION=1
unset _moetion_file _moetion_startup
