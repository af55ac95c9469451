package host

import (
	"os"
	"strings"
)

// sysctl returns a kernel setting; key is a path below /proc/sys. A setting that
// the kernel does not have is "".
func sysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func setSysctl(key, value string) error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) }

func sysctlCommand(key, value string) string {
	// A dot within a name is a slash, and the other way round (sysctl(8)).
	return "sysctl -w " + strings.Map(func(r rune) rune {
		switch r {
		case '/':
			return '.'
		case '.':
			return '/'
		}
		return r
	}, key) + "=" + value
}

// forwardingKey is the switch for packet forwarding.
func forwardingKey(is4 bool) string {
	if is4 {
		return "net/ipv4/ip_forward"
	}
	return "net/ipv6/conf/all/forwarding"
}

// deviceSettings are what each device of ours is set to before it goes up.
// Nobody on a tunnel device is found by link-local address, and nobody there
// has routes to advertise: who sends them means harm.
func deviceSettings(device string) [][2]string {
	return [][2]string{
		{"net/ipv6/conf/" + device + "/addr_gen_mode", "1"}, // none
		{"net/ipv6/conf/" + device + "/accept_ra", "0"},
	}
}
