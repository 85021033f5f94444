#compdef topiary
# Completion of topiary for zsh: source <(topiary completion zsh)

# Whether the value may be a path, whether it is a list, and names that it may be.
_topiary_value() {
    local files=$1 list=$2
    shift 2
    (( list )) && compset -P '*,'
    (( $# )) && compadd -- "$@"
    (( files )) && _files
}

_topiary() {
    local -a commands=(
@commands@
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    shift words
    (( CURRENT-- ))
    case $words[1] in
@cases@
    esac
}

if [[ $funcstack[1] == _topiary ]]; then
    _topiary "$@"
else
    compdef _topiary topiary
fi
