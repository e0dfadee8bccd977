package backend

import (
	"slices"
	"strings"
)

// MergeEnv joins environments, entries of the form KEY=VALUE, into one with a
// single entry for each name: that of the last environment that has it.
func MergeEnv(layers ...[]string) []string {
	var merged []string
	position := map[string]int{}
	for _, entry := range slices.Concat(layers...) {
		name, _, _ := strings.Cut(entry, "=")
		if i, ok := position[name]; ok {
			merged[i] = entry
			continue
		}
		position[name] = len(merged)
		merged = append(merged, entry)
	}
	return merged
}
