# Completion of topiary for bash: source <(topiary completion bash)

# Flags of a command; those that take a value end in "=".
_topiary_flags() {
    case $1 in
@flags@
    esac
}

# Names that a flag takes as its value, then "/" if it takes a path and "," if it takes a list.
_topiary_values() {
    case $1:$2 in
@values@
    esac
}

_topiary() {
    local line=${COMP_LINE:0:COMP_POINT} command=${COMP_WORDS[1]}
    # Not bash's own words, which end at "=" and ":".
    local word=${line##*[[:space:]]}
    local flag="" start="" value="" known="" head="" breaks="" kept="" item
    local -a before found=()
    read -ra before <<< "${line%"$word"}"
    local last=${before[${#before[@]} - 1]}
    if [[ ${#before[@]} -eq 1 ]]; then
        found=($(compgen -W "@commands@ --help --version" -- "$word"))
    elif [[ $command == completion ]]; then
        found=($(compgen -W "bash zsh fish" -- "$word"))
    elif [[ $word == --*=* ]]; then
        flag=${word%%=*} start=${word%%=*}= value=${word#*=}
    elif [[ $last == --* && " $(_topiary_flags "$command") " == *" $last= "* ]]; then
        flag=$last value=$word
    elif [[ $word == -* || -z $word$(_topiary_values "$command" -) ]]; then
        found=($(compgen -W "$(_topiary_flags "$command")" -- "$word"))
        [[ ${#found[@]} -eq 1 && ${found[0]} == *= ]] && compopt -o nospace 2> /dev/null
    else
        flag=- value=$word
    fi
    if [[ $flag ]]; then
        known=" $(_topiary_values "$command" "$flag") "
        [[ $known == *" , "* ]] && head=${value%"${value##*,}"}
        while IFS= read -r item; do
            found+=("$start$head$item")
        done < <(
            compgen -W "${known//[,\/]/}" -- "${value#"$head"}"
            [[ $known == *" / "* ]] && compgen -f -- "${value#"$head"}"
        )
        [[ $known == *" / "* ]] && compopt -o filenames 2> /dev/null
    fi
    # bash keeps what stands before the last of the characters that break words.
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+="="
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=":"
    [[ $breaks ]] && kept=${word%"${word##*[$breaks]}"}
    COMPREPLY=()
    for item in "${found[@]}"; do
        COMPREPLY+=("${item#"$kept"}")
    done
}
complete -F _topiary topiary
