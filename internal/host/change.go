package host

// Kind is the kind of object that a change concerns; repairs are counted by
// kind.
type Kind string

const (
	KindSysctl    Kind = "sysctl"
	KindLink      Kind = "link"
	KindAddress   Kind = "address"
	KindRoute     Kind = "route"
	KindNeighbour Kind = "neighbour"
	KindFDB       Kind = "fdb"
	KindNFTables  Kind = "nftables"
	KindForward   Kind = "forward" // the accept rule in another program's FORWARD chain
	KindFastPath  Kind = "fast-path"
	KindPods      Kind = "pods" // the pods' bridge
)

// Kinds returns all kinds, in the order in which reports list them.
func Kinds() []Kind {
	return []Kind{KindSysctl, KindLink, KindAddress, KindFDB, KindNeighbour, KindRoute, KindNFTables, KindForward, KindFastPath, KindPods}
}

// Change is one change of the kernel's state, made or planned.
type Change struct {
	Kind    Kind
	Command string // the equivalent shell command
}

// Commands returns the commands of changes.
func Commands(changes []Change) []string {
	var all []string
	for _, c := range changes {
		all = append(all, c.Command)
	}
	return all
}

// Transition returns the commands that lead a host from one state to another.
// It does no I/O.
func Transition(from, to State) []string {
	var all []string
	for _, s := range diff(observe(from), to) {
		all = append(all, s.Command)
	}
	return all
}

// Apply makes the kernel equal to the state and returns what it changed. It
// continues after an error, because the steps are independent, and returns all
// errors joined.
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
