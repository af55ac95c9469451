package subnet

// RejectionLog remembers which rejections were logged, so that each is logged once.
// The zero value is ready for use.
type RejectionLog struct{ logged map[string]loggedRejection }

type loggedRejection struct {
	Rejection
	revision int64
}

// New returns the rejections of a snapshot that were not in the last one, or not at
// the same revision of the entry, or for another reason.
func (l *RejectionLog) New(rejected []Rejection, revision func(key string) int64) []Rejection {
	logged := make(map[string]loggedRejection, len(rejected))
	var fresh []Rejection
	for _, x := range rejected {
		is := loggedRejection{x, revision(x.Key)}
		if was, ok := l.logged[x.Key]; !ok || was != is {
			fresh = append(fresh, x)
		}
		logged[x.Key] = is
	}
	l.logged = logged
	return fresh
}
