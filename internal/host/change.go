package host

// Kind is what a change is about; repairs are counted by it.
type Kind string

// The kinds of changes.
const (
	KindSysctl    Kind = "sysctl"
	KindLink      Kind = "link"
	KindAddress   Kind = "address"
	KindRoute     Kind = "route"
	KindNeighbour Kind = "neighbour"
	KindFDB       Kind = "fdb"
	KindNFTables  Kind = "nftables"
	KindForward   Kind = "forward" // the accept in somebody's FORWARD chain
	KindFastPath  Kind = "fast-path"
)

// Kinds returns all of them, in the order in which they are applied.
func Kinds() []Kind {
	return []Kind{KindSysctl, KindLink, KindAddress, KindFDB, KindNeighbour, KindRoute, KindNFTables, KindForward, KindFastPath}
}

// Change is one thing that was, or would be, changed in the kernel.
type Change struct {
	Kind    Kind
	Command string // what a person would type
}

// Commands returns the commands of changes.
func Commands(changes []Change) []string {
	var all []string
	for _, c := range changes {
		all = append(all, c.Command)
	}
	return all
}

// Transition returns, purely, what a person would type to lead a host from one
// state to another.
func Transition(from, to State) []string {
	var all []string
	for _, s := range diff(observe(from), to) {
		all = append(all, s.Command)
	}
	return all
}

// Apply makes the kernel equal to the state and returns what it changed. It goes
// on past an error, since each part stands for itself, and returns all errors
// together.
func Apply(s State) ([]Change, error) {
	others := &survey{}
	have, err := read(0, others)
	if err != nil {
		return nil, err
	}
	if err := others.within(s.Firewall.Forward); err != nil {
		return nil, err
	}
	have.foreign = others.foreign
	return write(have, diff(have, s))
}
