{{/* What every pod has in common: the restricted profile of pod security, and nothing of the Kubernetes API. */}}

{{- define "lacre.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch # keys written with mode 0600 keep it
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lacre.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A component's values: where its pods may run. */}}
{{- define "lacre.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "lacre.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* NATS' authority: a file that `[nats] ca` names. The system's authorities stay for all other servers. */}}
{{- define "lacre.ca.mount" -}}
{{- if include "lacre.nats.ca" . }}
- {name: nats-ca, mountPath: /etc/lacre/nats-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "lacre.ca.volume" -}}
{{- with include "lacre.nats.ca" . }}
- name: nats-ca
  secret: {secretName: {{ . | quote }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end -}}

{{/* A component's values: the variables, mounts and volumes that the operator adds. */}}
{{- define "lacre.env" -}}
{{- with .env }}{{ toYaml . }}{{ end }}
{{- end -}}

{{- define "lacre.extra.mounts" -}}
{{- with .extraVolumeMounts }}{{ toYaml . }}{{ end }}
{{- end -}}

{{- define "lacre.extra.volumes" -}}
{{- with .extraVolumes }}{{ toYaml . }}{{ end }}
{{- end -}}

{{/* (list $ "component" values): the account whose annotations a cloud reads. */}}
{{- define "lacre.serviceAccount" -}}
{{- $root := index . 0 }}
{{- $values := index . 2 }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "lacre.fullname" $root }}-{{ index . 1 }}
  labels: {{- include "lacre.labels" (list $root (index . 1)) | nindent 4 }}
  {{- with $values.serviceAccount.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}
